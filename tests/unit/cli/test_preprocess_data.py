"""JSONL to .bin/.idx: nothing lost, the same bytes for any number of workers, clear refusals."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from megatron_tikmix.cli.main import main
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.prepare import parts
from megatron_tikmix.prepare.readers import Reading
from megatron_tikmix.prepare.sources import Source
from megatron_tikmix.prepare.train_tokenizer import sample

# What breaks a careless tokenizer or reader.
TEXTS = [
    "plain words, and more plain words\n",
    "  leading and trailing space \t\r\n",
    "e\u0301 é 日本語 😀 \u2028 \x00 \x85",
    "a document that says <|endoftext|> in its middle",
    "",
    "x",
]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def preprocess(corpus: object, output: Path, *options: object) -> int:
    arguments = ["--input", corpus, "--output", output, *options]
    if not {"--tokenizer", "--tokenizer_library"} & set(options):
        arguments.append("--train_tokenizer")
        if "--vocab_size" not in options:
            arguments += ["--vocab_size", 300]
    return main(["preprocess", *map(str, arguments)])


def read_back(manifest: DomainManifest, domain: str, split: str) -> list[list[int]]:
    """Documents as megatron-core reads them."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(manifest.split(domain, split).prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [document.tolist() for document in dataset]


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """What a run has published."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two domains, of which one has no validation split."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "b.prose" / "train.jsonl", TEXTS * 3)
    write_jsonl(folder / "b.prose" / "validation.jsonl", TEXTS[1:4])
    write_jsonl(folder / "a_code" / "train.jsonl", [f"x_{n} = {n}\n" * 30 for n in range(40)])
    return folder


@pytest.fixture(scope="module")
def tokens(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("tokens")
    assert preprocess(corpus, output) == 0
    return output


# What is written ---------------------------------------------------------------------------


def test_manifest_and_files(tokens):
    manifest = DomainManifest.load(tokens / "domains.yaml")
    assert {name: list(splits) for name, splits in manifest.domains.items()} == {
        "a_code": ["train"],
        "b.prose": ["train", "validation"],
    }
    manifest.check_files(["a_code", "b.prose"], ["train"])
    manifest.check_files(["b.prose"], ["validation"])
    names = {"a_code_train", "b.prose_train", "b.prose_validation"}
    files = {f"{name}.{suffix}" for name in names for suffix in ("bin", "idx")}
    assert set(all_bytes(tokens)) == files | {"domains.yaml", "tokenizer.json"}


def test_round_trip(tokens, corpus):
    manifest = DomainManifest.load(tokens / "domains.yaml")
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer.path))
    assert tokenizer.token_to_id("<|endoftext|>") == manifest.eod == 0
    for domain, splits in manifest.domains.items():
        for split, listed in splits.items():
            lines = (corpus / domain / f"{split}.jsonl").read_text().splitlines()
            texts = [text for line in lines if (text := json.loads(line)["text"])]
            documents = read_back(manifest, domain, split)
            assert [decode(tokenizer, ids[:-1]) for ids in documents] == texts
            for ids in documents:
                assert ids.index(manifest.eod) == len(ids) - 1
            assert listed.documents == len(texts)
            assert listed.tokens == sum(map(len, documents))


def test_table_counts_empty_documents(corpus, tmp_path, capsys):
    assert preprocess(corpus, tmp_path) == 0
    rows = [re.findall(r"[\w.]+", line) for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if row[:2] == ["b.prose", "train"])
    assert row[2:4] == ["15", "3"]


@pytest.mark.parametrize("workers", [1, 3])
def test_same_bytes_for_any_number_of_workers(corpus, tokens, tmp_path, run_command, workers):
    options = ["--train_tokenizer", "--vocab_size", 300, "--workers", workers]
    result = run_command("preprocess", "--input", corpus, "--output", tmp_path, *options)
    assert result.returncode == 0, result.stderr
    assert all_bytes(tmp_path) == all_bytes(tokens)


def test_same_bytes_for_any_batch_and_part_size(corpus, tokens, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", 1)
    for part_bytes in (150, 1000):
        output = tmp_path / str(part_bytes)
        assert preprocess(corpus, output, "--part_bytes", part_bytes) == 0
        assert all_bytes(output) == all_bytes(tokens)


def test_files_by_name_pattern_and_field(tmp_path):
    for n in range(3):
        write_jsonl(tmp_path / "shards" / f"{n}.jsonl", [f"shard {n}"], field="content")
    held_out = write_jsonl(tmp_path / "[held out].jsonl", ["held out"], field="content")
    status = preprocess(
        f"web:train={tmp_path}/shards/*.jsonl",
        tmp_path / "tokens",
        *("--input", f"web:validation={held_out}", "--text_field", "content"),
    )
    assert status == 0
    manifest = DomainManifest.load(tmp_path / "tokens" / "domains.yaml")
    tokenizer = Tokenizer.from_file(str(manifest.tokenizer.path))
    texts = [decode(tokenizer, ids[:-1]) for ids in read_back(manifest, "web", "train")]
    assert texts == ["shard 0", "shard 1", "shard 2"]
    assert manifest.split("web", "validation").documents == 1


def test_a_given_tokenizer_is_used_and_kept(corpus, tokens, tmp_path):
    given_tokenizer = tokens / "tokenizer.json"
    assert preprocess(corpus, tmp_path, "--tokenizer", given_tokenizer) == 0
    assert all_bytes(tmp_path) == all_bytes(tokens)


def test_large_vocabularies_take_wider_tokens(tmp_path):
    words = {"[end]": 70_000, "far": 69_999, "near": 1}
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "pre_tokenizer": {"type": "Whitespace"},
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "near"},
            }
        )
    )
    # Settings for serving, which would cut documents short.
    tokenizer.enable_truncation(max_length=2)
    tokenizer.save(str(tmp_path / "words.json"))
    text = write_jsonl(tmp_path / "text.jsonl", ["far near far near"])
    options = ("--tokenizer", tmp_path / "words.json", "--eod_token", "[end]")
    assert preprocess(f"d:train={text}", tmp_path / "tokens", *options) == 0
    manifest = DomainManifest.load(tmp_path / "tokens" / "domains.yaml")
    assert (manifest.vocab_size, manifest.eod) == (70_001, 70_000)
    assert read_back(manifest, "d", "train") == [[69_999, 1, 69_999, 1, 70_000]]


def test_tokenizer_is_trained_on_an_equal_share(tmp_path):
    def source(domain: str, split: str, *files: list[str]) -> Source:
        paths = (
            write_jsonl(tmp_path / f"{domain}_{split}_{number}.jsonl", texts)
            for number, texts in enumerate(files)
        )
        return Source(domain, split, tuple(paths))

    sources = [
        source("small", "train", ["s" * 10]),
        source("large", "train", ["l" * 30] * 100),
        source("shards", "train", ["a" * 90], ["b" * 90]),
        source("shards", "validation", ["v" * 90]),
    ]
    texts = "".join(sample(sources, Reading("text"), 180, skip_bad=False))
    assert texts == "s" * 10 + "l" * 60 + "a" * 30 + "b" * 30


@given(st.lists(st.text(), min_size=1, max_size=5))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back(tokens, tmp_path, texts):
    path = write_jsonl(tmp_path / "any.jsonl", ["first", *texts])
    options = ("--tokenizer", tokens / "tokenizer.json")
    assert preprocess(f"any:train={path}", tmp_path / "out", *options) == 0
    manifest = DomainManifest.load(tmp_path / "out" / "domains.yaml")
    manifest.check_files(["any"], ["train"])
    tokenizer = Tokenizer.from_file(str(tokens / "tokenizer.json"))
    documents = read_back(manifest, "any", "train")
    assert [decode(tokenizer, ids[:-1]) for ids in documents] == ["first", *filter(None, texts)]


# Refusals ----------------------------------------------------------------------------------

GOOD_LINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "caf\xe9"}\n', "line 2: invalid UTF-8 at its byte 14; convert the file"),
        (
            b'{"text": "cut of\n',
            "line 2: malformed JSON: Unterminated string starting at its character 10; write one",
        ),
        (b"\xef\xbb\xbf{}\n", "line 2: malformed JSON: Unexpected UTF-8 BOM"),
        (b"[" * 100_000 + b"\n", "line 2: unreadable JSON: maximum recursion depth exceeded"),
        (b'{"id": ' + b"9" * 5000 + b"}\n", "line 2: unreadable JSON: Exceeds the limit"),
        (b'["text"]\n', 'line 2: not a JSON object; write {"text": ...}'),
        (b'{"body": "x", "id": 1}\n', "line 2: no field 'text' among 'body', 'id'; name the field"),
        (b"{}\n", "line 2: no field 'text' among none; name the field"),
        (b'{"text": null}\n', "line 2: field 'text' must be a string, and is null"),
        (b'{"text": ["x"]}\n', "line 2: field 'text' must be a string, and is [\"x\"]"),
        (b'{"text": "a \\ud800 b"}\n', "line 2: field 'text' holds half a surrogate pair"),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_bad_lines(corpus, tmp_path, capsys, line, message, split):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(GOOD_LINE + line + GOOD_LINE)
    assert preprocess(corpus, tmp_path / "tokens", "--input", f"bad:{split}={bad}") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {bad}: {message}")
    assert captured.err.count("\n") == 1
    assert not list((tmp_path / "tokens").glob("[!.]*")), "nothing half-written is left"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; remove it"),
        (b"\n\n", "has no documents with text; remove it"),
        (b'{"text": ""}\n', "has no documents with text; remove it"),
    ],
)
def test_files_without_documents(corpus, tmp_path, capsys, content, message):
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(content)
    assert preprocess(corpus, tmp_path / "tokens", "--input", f"bad:validation={empty}") == 2
    assert f"error: {empty} {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{tmp}/missing", "--input {tmp}/missing: no such folder; give a folder, or DOMAIN:SPLIT"),
        ("{tmp}", "--input {tmp}: no <domain>/<split>.jsonl file in it"),
        ("a:train={tmp}/no*.jsonl", "--input a:train={tmp}/no*.jsonl: no such file, and no file"),
        ("a:train={tmp}/none", "--input a:train={tmp}/none: no file in {tmp}/none that can be"),
        ("a:train={tmp}/a.pdf", "--input a:train={tmp}/a.pdf: {tmp}/a.pdf is of no kind that can"),
        ("a b:train={file}", "--input a b:train={file}: domain 'a b' must be a name made of"),
        ("a:in_sample={file}", "--input a:in_sample={file}: split 'in_sample' must be a name"),
    ],
)
def test_bad_inputs(tmp_path, capsys, value, message):
    words = {"tmp": tmp_path, "file": write_jsonl(tmp_path / "file.jsonl", ["x"])}
    (tmp_path / "none").mkdir()
    (tmp_path / "a.pdf").write_bytes(b"x")
    assert preprocess(value.format(**words), tmp_path / "tokens") == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(**words)}")


def test_folders_with_unfit_names(tmp_path, capsys):
    path = write_jsonl(tmp_path / "c++ <code>" / "train.jsonl", ["x"])
    assert preprocess(tmp_path, tmp_path / "tokens") == 2
    assert f"error: {path}: domain 'c++ <code>' must be a name" in capsys.readouterr().err


def test_a_file_given_twice(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a" / "train.jsonl", ["x"])
    assert preprocess(tmp_path, tmp_path / "tokens", "--input", f"a:train={path}") == 2
    assert f"error: {path} is given twice for a:train; give it once" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab_size", "256"], "--vocab_size (256) must be at least 257"),
        (["--workers", "0"], "--workers (0) must be at least 1"),
        (["--part_bytes", "0"], "--part_bytes (0) must be at least 1"),
        (["--eod_token", "x"], "--eod_token is for --tokenizer"),
        (["--shard", "0/2"], "--train_tokenizer cannot be sharded"),
        (["--adopt", "a:train"], "--adopt a:train: write DOMAIN:SPLIT=PREFIX"),
        (["--tokenizer_library", "tiktoken"], "--tokenizer_library tiktoken needs --tokenizer"),
        (["--tokenizer", "{tmp}/none"], "--tokenizer {tmp}/none: no such file"),
        (
            ["--tokenizer", "{corpus}/a_code/train.jsonl"],
            "--tokenizer {corpus}/a_code/train.jsonl: ",
        ),
        (["--tokenizer", "{tokens}/tokenizer.json", "--vocab_size", "9"], "--vocab_size is for"),
        (
            ["--tokenizer", "{tokens}/tokenizer.json", "--eod_token", "</s>"],
            "the tokenizer has no token '</s>'; name its end-of-document token with --eod_token",
        ),
    ],
)
def test_bad_options(corpus, tokens, tmp_path, capsys, options, message):
    folders = {"tmp": tmp_path, "corpus": corpus, "tokens": tokens}
    given_options = [option.format(**folders) for option in options]
    assert preprocess(corpus, tmp_path, *given_options) == 2
    assert capsys.readouterr().err.startswith(f"error: {message.format(**folders)}")
    assert not all_bytes(tmp_path)


def test_a_tokenizer_is_given_or_trained(corpus, tmp_path, capsys):
    arguments = ["--input", str(corpus), "--output", str(tmp_path)]
    for also in ([], ["--tokenizer", "x", "--train_tokenizer"]):
        assert main(["preprocess", *arguments, *also]) == 2
        assert "give either --tokenizer or --train_tokenizer" in capsys.readouterr().err


def test_a_tokenizer_cannot_be_trained_without_train_text(tmp_path, capsys):
    write_jsonl(tmp_path / "a" / "validation.jsonl", ["x"])
    assert preprocess(tmp_path, tmp_path / "tokens") == 2
    assert "--train_tokenizer: no domain has a train split" in capsys.readouterr().err


def test_a_failed_run_leaves_the_older_one_whole(corpus, tokens, tmp_path):
    assert preprocess(corpus, tmp_path) == 0
    bad = tmp_path.parent / "bad.jsonl"
    bad.write_bytes(GOOD_LINE + b"{")
    assert preprocess(corpus, tmp_path, "--input", f"a_code:validation={bad}") == 2
    assert all_bytes(tmp_path) == all_bytes(tokens)


def test_as_a_command_it_exits_with_2_and_one_sentence(tmp_path, run_command):
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "\xff"}\n')
    options = ["--input", f"a:train={bad}", "--output", tmp_path / "tokens", "--train_tokenizer"]
    result = run_command("preprocess", *options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {bad}: line 1: invalid UTF-8 at its byte 11; convert the file to UTF-8\n"
    )
