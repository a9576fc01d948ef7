"""Reading, dividing, restarting and merging: nothing lost, and the same bytes whoever did it."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tikmix.cli.main import main
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.tokenizer import TokenizerFiles
from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import BadDocument
from megatron_tikmix.prepare import pipeline
from megatron_tikmix.prepare.parts import PartWriter
from megatron_tikmix.prepare.readers import Document, Reading, documents, parts_of
from tests.conftest import write_tokens, write_word_tokenizer

TEXTS = [f"w{n} " * (1 + n % 7) for n in range(1, 60)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def read(path: Path, part_bytes: int = 1 << 20, **reading: object) -> list[object]:
    """The texts of a file, and the reasons of what is none."""
    found: list[object] = []
    for part in parts_of(path, part_bytes):
        for document in documents(part, Reading("text", **reading)):  # type: ignore[arg-type]
            is_text = isinstance(document, Document)
            found.append(document.text if is_text else (document.reason, str(document)))
    return found


# Reading -----------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=9), max_size=9), st.integers(1, 60), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_lines_are_a_partition(
    tmp_path: Path, texts: list[str], part_bytes: int, ends: bool
) -> None:
    path = tmp_path / "any.jsonl"
    content = b"\n".join(jsonl([text]).strip() for text in texts) + b"\n" * ends
    path.write_bytes(content)
    assert read(path, part_bytes) == texts


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(table, path, row_group_size=10)


def write_folder(path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"id": [*range(1, 61)], "text": [*TEXTS, "left out"]})
    rows.select(range(59)).save_to_disk(path)


def write_zst(path: Path) -> None:
    import pyarrow

    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(jsonl(TEXTS))


WRITERS = {
    "t.jsonl": lambda path: path.write_bytes(jsonl(TEXTS)),
    "t.json.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "t.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl(TEXTS))),
    "t.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl(TEXTS))),
    "t.jsonl.zst": write_zst,
    "t.parquet": write_parquet,
    "folder": write_folder,
    "t.txt.gz": lambda path: path.write_bytes(gzip.compress("\n".join(TEXTS).encode())),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("part_bytes", [100, 1 << 20])
def test_every_kind_of_file_gives_the_same_documents(
    tmp_path: Path, name: str, part_bytes: int
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    assert read(path, part_bytes, sample_by="line") == TEXTS
    if name in ("t.jsonl", "t.parquet", "folder"):
        assert (len(parts_of(path, part_bytes)) > 1) == (part_bytes == 100)


def test_what_one_document_is_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a\nb\n\n\nc\n")
    assert read(path, sample_by="line") == ["a", "b", "", "", "c"]
    assert read(path, sample_by="paragraph") == ["a\nb", "c"]
    assert read(path, sample_by="document") == ["a\nb\n\n\nc\n"]
    with pytest.raises(InputError, match="say with --sample_by what one document is"):
        read(path)


@pytest.mark.parametrize("name", ["t.json.gz", "t.jsonl.bz2", "t.jsonl.xz", "t.jsonl.zst"])
def test_truncated_files_give_what_is_whole_and_say_where_they_end(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-9])
    *texts, (reason, said) = read(path)
    assert texts == TEXTS[: len(texts)]
    assert reason == "damaged file"
    assert said.startswith(f"{path}: truncated or damaged after line ")


@pytest.mark.parametrize("name", ["t.parquet", "folder"])
def test_columns_that_are_damaged_missing_or_no_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    part = parts_of(path, 1 << 20)[0]
    (missing,) = documents(part, Reading("body"))
    assert isinstance(missing, BadDocument)
    assert f"{path}: no column 'body' among" in str(missing)
    (first, *_) = documents(part, Reading("id"))
    assert str(first).startswith(f"{path}: row 1: field 'id' must be a string, and is ")
    file = path if path.is_file() else next(path.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:50])
    ((reason, said),) = read(path)
    assert reason == "damaged file"
    assert str(path) in said


def test_bad_lines_are_numbered_over_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(jsonl(["x"] * 9) + b"\n{\n" + jsonl(["x"]))
    for part_bytes in (5, 60, 1000):
        bad = [each for each in read(path, part_bytes) if each != "x"]
        assert len(bad) == 1
        assert f"{path}: line 11: malformed JSON" in bad[0][1]


# The whole command -------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    for domain in ("a", "b"):
        (folder / domain).mkdir(parents=True)
        (folder / domain / "train.jsonl").write_bytes(jsonl(TEXTS))
    (folder / "b" / "validation.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:5])))
    write_word_tokenizer(tmp_path / "words.json")
    return folder


def run(text: Path, output: str, *options: object) -> int:
    command = ["--output", text.parent / output, "--tokenizer", text.parent / "words.json"]
    command += ["--eod_token", "w0", "--part_bytes", 300, *options]
    if "--adopt" not in options:
        command += ["--input", text]
    return main(["preprocess", *map(str, command)])


def published(text: Path, output: str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (text.parent / output).iterdir() if p.is_file()}


def manifest_of(text: Path, output: str) -> DomainManifest:
    manifest = DomainManifest.load(text.parent / output / "domains.yaml")
    manifest.check_tokenizer()
    for domain, splits in manifest.domains.items():
        manifest.check_files([domain], splits)
    return manifest


def test_shards_and_processes_give_the_same_bytes(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(text, "whole") == 0
    manifest_of(text, "whole")
    for shard in ("2/3", "0/3"):
        assert run(text, "shards", "--shard", shard) == 0
    assert not published(text, "shards")
    assert run(text, "shards", "--merge") == 2
    assert "parts are not there, the first being part" in capsys.readouterr().err
    assert run(text, "shards", "--shard", "1/3") == 0
    assert "shard 1/3 is done; of all shards, 13 of 13 parts are" in capsys.readouterr().out
    assert run(text, "shards", "--merge") == 0
    assert published(text, "shards") == published(text, "whole")
    assert not (text.parent / "shards" / ".unfinished").exists()
    monkeypatch.setattr(pipeline, "SMALL_BYTES", 1)
    assert run(text, "processes", "--workers", "2") == 0
    assert published(text, "processes") == published(text, "whole")
    # A problem in a worker process is told like any other.
    with (text / "b" / "train.jsonl").open("ab") as file:
        file.write(b"{\n")
    assert run(text, "bad", "--workers", "2") == 2
    assert "train.jsonl: line 60: malformed JSON" in capsys.readouterr().err
    assert not published(text, "bad")


def test_a_restart_does_not_do_again_what_is_finished(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(text, "whole") == 0
    written: list[str] = []
    whole = PartWriter.write

    def counted(self, part, prefix, advance):  # type: ignore[no-untyped-def]
        if len(written) == 5:
            raise InputError("cut off")
        written.append(str(prefix))
        return whole(self, part, prefix, advance)

    monkeypatch.setattr(PartWriter, "write", counted)
    assert run(text, "cut") == 2
    first, written = written, []
    assert run(text, "cut") == 2
    second, written = written, []
    assert run(text, "cut") == 0
    assert len(first) == len(second) == 5
    assert len(written) == 3
    assert not set(first) & set(second) | set(first) & set(written) | set(second) & set(written)
    assert published(text, "cut") == published(text, "whole")
    written = []
    assert run(text, "cut") == 0
    assert not written, "nothing had changed"
    (text / "a" / "train.jsonl").write_bytes(jsonl(TEXTS[:3]))
    assert run(text, "cut") == 0
    assert {Path(prefix).parent.name[:8] for prefix in written} == {"a_train-"}
    assert manifest_of(text, "cut").split("a", "train").documents == 3


def test_a_cut_while_files_are_published_is_made_good(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(text, "whole") == 0
    replace = os.replace
    for stop in (1, 2, 7):  # the tokenizer, the first file, the last
        done = 0

        def replaced(old: object, new: object, stop: int = stop) -> None:
            nonlocal done
            done += Path(str(new)).parent.name.startswith("cut")
            if done == stop:
                raise KeyboardInterrupt
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            with pytest.raises(KeyboardInterrupt):
                run(text, f"cut{stop}", "--part_bytes", "1000")
        assert not (text.parent / f"cut{stop}" / "domains.yaml").exists()
        assert run(text, f"cut{stop}", "--part_bytes", "1000") == 0
        assert published(text, f"cut{stop}") == published(text, "whole")


@pytest.mark.parametrize("name", ["merged.idx", "merged.json"])
def test_a_cut_while_a_single_part_becomes_the_whole_is_made_good(
    text: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert run(text, "whole") == 0
    replace = os.replace

    def full(old: object, new: object) -> None:
        if Path(str(new)).name == name:
            raise OSError("no space left")
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert run(text, "cut", "--part_bytes", 1 << 20) == 2
    assert run(text, "cut", "--part_bytes", 1 << 20) == 0
    assert published(text, "cut") == published(text, "whole")


def test_what_another_run_has_unfinished_stays(text: Path) -> None:
    train = text / "a" / "train.jsonl"
    inputs = [f"a:train-books={train}", f"tokenizer-words:train={train}"]
    others = [each for value in inputs for each in ("--input", value)]
    output = text.parent / "out"
    command = ["--tokenizer_library", "byte-level", "--output", str(output), *others]
    assert main(["preprocess", *command, "--shard", "0/1"]) == 0
    unfinished = output / ".unfinished"
    (unfinished / "tokenizer-0123456789abcdef").mkdir()
    there = set(unfinished.iterdir())
    assert len(there) == 3
    assert run(text, "out", "--shard", "0/1") == 0
    train.write_bytes(jsonl(["w1"]))  # what was made of its former content goes
    options = ["--output", str(output), "--input", str(text), "--train_tokenizer"]
    assert main(["preprocess", *options, "--vocab_size", "300"]) == 0
    assert set(unfinished.iterdir()) == there


def test_a_domain_can_be_added_later_and_another_tokenizer_is_refused(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = text.parent / "more.jsonl"
    more.write_bytes(jsonl(TEXTS[:9]))
    assert run(text, "out") == 0
    options = ["--tokenizer_library", "byte-level", "--output", str(text.parent / "out")]
    options += ["--input", f"c:train={more}"]
    assert main(["preprocess", *options]) == 2
    assert "lists a:train, b:train, b:validation, made with another" in capsys.readouterr().err
    assert main(["preprocess", *options, "--replace"]) == 0
    manifest = manifest_of(text, "out")
    assert list(manifest.domains) == ["c"]
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.library == "byte-level"
    assert manifest.split("c", "train").tokens == sum(len(text) + 1 for text in TEXTS[:9])
    assert run(text, "out", "--replace") == 0
    assert run(text, "out", "--input", f"c:train={more}") == 0
    before = published(text, "out")
    (text / "a" / "train.jsonl").unlink()
    assert run(text, "out") == 0, "a stays in the manifest"
    assert published(text, "out").keys() == before.keys()
    assert set(manifest_of(text, "out").domains) == {"a", "b", "c"}


def test_skipped_documents_are_counted_by_reason(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = gzip.compress(jsonl(["w1", "w2"]))
    (text / "b" / "validation.jsonl.gz").write_bytes(packed[:-3])
    bad = [b"{\n", b'{"body": "x"}\n', b'{"text": 3}\n', b'{"text": "\xff"}\n', b"[]\n", b"{\n"]
    (text / "a" / "train.jsonl").write_bytes(jsonl(["w1 w2"]) + b"".join(bad) + jsonl(["", "w3"]))
    assert run(text, "out") == 2
    assert "a/train.jsonl: line 2: malformed JSON" in capsys.readouterr().err
    assert run(text, "out", "--on_error", "skip") == 0
    warnings = capsys.readouterr().err
    for words in (
        "a:train: 2 skipped, malformed JSON; the first: ",
        "a:train: 1 skipped, missing field; the first: ",
        "a:train: 1 skipped, not a string; the first: ",
        "a:train: 1 skipped, invalid UTF-8; the first: ",
        "a:train: 1 skipped, not an object; the first: ",
        "b:validation: 1 skipped, damaged file; the first: ",
    ):
        assert words in warnings
    manifest = manifest_of(text, "out")
    assert manifest.split("a", "train").tokens == 3 + 2
    assert manifest.split("b", "validation").documents == 2


def test_pairs_that_exist_are_adopted(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = text.parent / "theirs"
    theirs.mkdir()
    write_tokens(theirs / "web", [np.arange(1, 100)] * 3)
    assert run(text, "out", "--adopt", f"web:train={theirs / 'web'}") == 0
    manifest = manifest_of(text, "out")
    assert manifest.split("web", "train").prefix == theirs / "web"
    assert manifest.split("web", "train").tokens == 297
    assert run(text, "out", "--adopt", f"c:train={theirs / 'no'}") == 2
    assert "no.idx is missing" in capsys.readouterr().err
    write_tokens(theirs / "web", [np.arange(1, 300)])
    assert run(text, "out", "--adopt", f"c:train={theirs / 'web'}") == 2
    assert "token 249 has id 250" in capsys.readouterr().err


def test_changed_files_and_tokenizers_are_refused_at_load(text: Path) -> None:
    assert run(text, "out") == 0
    manifest = manifest_of(text, "out")
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.path is not None
    path = manifest.split("a", "train").bin_path
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a_train.bin and .* are not the files that .* lists as"):
        manifest.check_files(["a"], ["train"])
    words = json.loads(manifest.tokenizer.path.read_text())
    words["model"]["vocab"]["w1"], words["model"]["vocab"]["w2"] = 2, 1
    manifest.tokenizer.path.write_text(json.dumps(words))
    with pytest.raises(InputError, match="is not the tokenizer that the token files of"):
        manifest.check_tokenizer()


def test_a_folder_of_transformers_needs_transformers(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run(text, "out", "--tokenizer", text) == 2
    assert "there is no tokenizer.json in it" in capsys.readouterr().err
    # With one, its own end-of-sequence token is the default.
    folder = text.parent / "hf"
    folder.mkdir()
    write_word_tokenizer(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "w7"}}')
    command = ["--output", str(text.parent / "out"), "--input", str(text)]
    assert main(["preprocess", *command, "--tokenizer", str(folder)]) == 0
    assert manifest_of(text, "out").eod == 7


def run_with_folder(text: Path, output: Path, folder: Path, *options: object) -> int:
    command = ["--output", output, "--tokenizer", folder, "--eod_token", "w0", *options]
    return main(["preprocess", *map(str, command)])


def model_folder(folder: Path, **files: str) -> Path:
    """A model's folder, as `transformers` saves it: a tokenizer, weights and sub-folders."""
    for inner in ("onnx", ".git"):
        (folder / inner).mkdir(parents=True)
        (folder / inner / "large").write_text("weights")
    for name in ("model-1.safetensors", "pytorch_model.bin", "tf_model.h5"):
        (folder / name).write_text("weights")
    write_word_tokenizer(folder / "tokenizer.json")
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


def test_of_a_models_folder_only_the_tokenizer_is_read_and_kept(text: Path) -> None:
    model = model_folder(text.parent / "model", merges="a b")
    digest = hashlib.sha256()  # as manifests have it that were made with these files alone
    for name in ("merges", "tokenizer.json"):
        content = (model / name).read_bytes()
        digest.update(b"\0%s\0%d\0%s" % (name.encode(), len(content), content))
    assert TokenizerFiles(model).checksum() == digest.hexdigest()[:32]
    output = text.parent / "out"
    assert run_with_folder(text, output, model, "--input", text) == 0
    assert manifest_of(text, "out").tokenizer == TokenizerFiles(output / "tokenizer")
    assert sorted(os.listdir(output / "tokenizer")) == ["merges", "tokenizer.json"]


def test_a_tokenizers_folder_takes_the_place_of_a_former_one(text: Path) -> None:
    output = text.parent / "out"
    for name in ("first", "second"):
        model = model_folder(text.parent / name, **{name: "a b"})
        assert run_with_folder(text, output, model, "--input", text, "--replace") == 0
        manifest_of(text, "out")
    assert sorted(os.listdir(output / "tokenizer")) == ["second", "tokenizer.json"]
    assert not list(output.glob("*.tmp"))


def test_a_domain_is_added_with_the_tokenizer_that_was_kept(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = text.parent / "out"
    assert run_with_folder(text, output, model_folder(text.parent / "hf"), "--input", text) == 0
    (text.parent / "link").symlink_to(text.parent)
    monkeypatch.chdir(text.parent)
    for name, kept in (("c", output), ("d", text.parent / "link" / "out")):
        more = f"{name}:train={text}/a/train.jsonl"
        assert run_with_folder(text, Path("out"), kept / "tokenizer", "--input", more) == 0
    moved = output.rename(text.parent / "moved")
    manifest = manifest_of(text, "moved")
    assert manifest.tokenizer == TokenizerFiles(moved / "tokenizer")
    assert list(manifest.domains) == ["d", "c", "a", "b"]
