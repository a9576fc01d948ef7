"""The corpus: six domains, a clean split, the same bytes every time."""

import ast
import json
import os
import string
from pathlib import Path

import build_corpus
import pytest
from hypothesis import given
from hypothesis import strategies as st

SIZE = 100_000
DOMAINS = {
    "python_code",
    "python_docs",
    "cpp_headers",
    "package_prose",
    "unicode_tables",
    "noise",
}


def build(folder: Path, *options: str) -> int:
    return build_corpus.main(
        ["--output", str(folder), "--max_bytes_per_domain", str(SIZE), *options]
    )


def read(folder: Path, domain: str, split: str) -> list[dict[str, str]]:
    text = (folder / domain / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def all_bytes(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    assert build(folder) == 0
    return folder


def test_six_domains_of_two_files(corpus):
    expected = {
        f"{domain}/{split}.jsonl" for domain in DOMAINS for split in ("train", "validation")
    }
    assert set(all_bytes(corpus)) == expected


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_domain_has_its_size_and_enough_validation(corpus, domain):
    size = {
        split: sum(len(line["text"].encode()) for line in read(corpus, domain, split))
        for split in ("train", "validation")
    }
    total = sum(size.values())
    assert 0.9 * SIZE < total < 1.1 * SIZE
    assert 0.08 * total <= size["validation"] <= 0.2 * total
    assert len({line["source"] for line in read(corpus, domain, "validation")}) >= 5


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_no_document_and_no_text_is_on_both_sides(corpus, domain):
    train, validation = (read(corpus, domain, split) for split in ("train", "validation"))
    for key in ("source", "text"):
        assert {line[key] for line in train}.isdisjoint(line[key] for line in validation)
    texts = [line["text"] for line in train + validation]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_lines_have_text_and_a_relative_source(corpus, domain):
    for split in ("train", "validation"):
        for line in read(corpus, domain, split):
            assert set(line) == {"text", "source"}
            assert line["text"].strip()
            assert not line["source"].startswith(("/", "."))


def test_domains_hold_what_they_are_named_for(corpus):
    def text(domain: str) -> str:
        return "\n".join(line["text"] for line in read(corpus, domain, "train"))

    assert "def " in text("python_code")
    assert '"""' not in text("python_code")
    assert "#include" in text("cpp_headers")
    assert "SMALL LETTER" in text("unicode_tables")
    base64 = set(string.ascii_letters + string.digits + "+/=\n")
    assert set(text("noise")) <= base64
    assert "megatron-tikmix/METADATA" not in build_corpus.package_prose()


def test_same_bytes_again_in_another_process(corpus, tmp_path, run_tool):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = run_tool(
        "build_corpus.py", "--output", tmp_path, "--max_bytes_per_domain", SIZE, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert all_bytes(tmp_path) == all_bytes(corpus)
    assert set(result.stdout.split()) >= DOMAINS


def test_another_seed_draws_another_sample(corpus, tmp_path):
    assert build(tmp_path, "--seed", "5") == 0
    for domain in DOMAINS:
        assert read(tmp_path, domain, "train") != read(corpus, domain, "train")


def test_noise_can_be_left_out(tmp_path):
    arguments = build_corpus.build_parser().parse_args(
        ["--output", str(tmp_path), "--noise_bytes", "0"]
    )
    build_corpus.check(arguments)
    assert set(build_corpus.domains(arguments)) == DOMAINS - {"noise"}


# Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_bytes_per_domain", "10"], "--max_bytes_per_domain (10) must be at least 100000"),
        (["--noise_bytes", "-1"], "--noise_bytes (-1) must be at least 100000"),
        (["--validation_fraction", "0"], "--validation_fraction (0.0) must be above 0"),
        (["--validation_fraction", "nan"], "--validation_fraction (nan) must be above 0"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert build(tmp_path, *options) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not all_bytes(tmp_path)


def test_output_must_be_a_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    assert build(file) == 2
    assert capsys.readouterr().err == f"error: --output {file} is a file; give a folder\n"


def test_a_machine_without_torch(monkeypatch):
    monkeypatch.setattr(build_corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(build_corpus.InputError, match="torch is not installed; install it"):
        build_corpus.cpp_headers()


def recipes_of(number: int, monkeypatch) -> None:
    """Let every domain but noise have `number` documents of 1,000 bytes."""
    documents = {f"document {n}": lambda n=n: f"{n:03d} " * 250 for n in range(number)}
    for name in DOMAINS - {"noise"}:
        recipe = lambda: documents  # noqa: E731
        recipe.__name__ = name
        monkeypatch.setattr(build_corpus, name, recipe)


def test_too_few_documents_are_refused(tmp_path, capsys, monkeypatch):
    recipes_of(3, monkeypatch)
    assert build(tmp_path) == 2
    assert "error: python_code: this machine has only 3 documents" in capsys.readouterr().err


def test_scarce_text_is_said(tmp_path, capsys, monkeypatch):
    recipes_of(30, monkeypatch)
    assert build(tmp_path) == 0
    errors = capsys.readouterr().err
    assert "warning: package_prose: this machine has only 29,970 bytes" in errors
    assert "noise" not in errors


def test_help_teaches(run_tool):
    result = run_tool("build_corpus.py", "--help")
    assert result.returncode == 0
    assert "python tools/build_corpus.py --" in result.stdout


# Parts -------------------------------------------------------------------------------------


@given(st.text(alphabet=st.sampled_from("ab é€😀\n"), max_size=200), st.integers(4, 40))
def test_cut_keeps_every_character_and_the_limit(text, limit):
    pieces = list(build_corpus.cut(text, limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= limit for piece in pieces)


def test_cut_prefers_blank_lines_then_lines_then_words():
    assert list(build_corpus.cut("aaaaa\n\nb\nc d e", 10)) == ["aaaaa\n\n", "b\nc d e"]
    assert list(build_corpus.cut("aaaa bb\nc d e", 10)) == ["aaaa bb\n", "c d e"]
    assert list(build_corpus.cut("aaaa bb c d e", 9)) == ["aaaa bb ", "c d e"]


def test_pieces_of_a_long_document_stay_together():
    candidates = {f"{n}": lambda n=n: f"{n} word " * 20_000 for n in range(100)}
    documents = list(build_corpus.choose(candidates, 3_000_000, seed=1))
    assert all(len(document.pieces) == 2 for document in documents)
    assert all(len(piece.encode()) <= 16_000 for d in documents for piece in d.pieces)
    assert sum(document.bytes for document in documents) >= 2_900_000


def test_repeated_documents_and_paragraphs_are_dropped():
    licence = "Permission is hereby granted " * 20
    candidates = {
        "a": lambda: f"Copyright A\n\n{licence}\n\n" + "first " * 50,
        "b": lambda: f"Copyright B\n\n{licence.upper()}\n\n" + "second " * 50,
        "c": lambda: "short\n\n" * 50,
        "d": lambda: "short\n\n" * 50,
        "half a surrogate": lambda: "\ud800" * 300,
    }
    texts = [d.pieces[0] for d in build_corpus.choose(candidates, 10**6, seed=1)]
    assert len(texts) == 3
    assert sum("permission" in text.lower() for text in texts) == 1


def test_a_documents_place_does_not_depend_on_the_others():
    def order(names):
        candidates = {name: lambda name=name: f"{name} " * 300 for name in names}
        return [document.source for document in build_corpus.choose(candidates, 10**7, seed=3)]

    everything = order(string.ascii_lowercase)
    assert order("qwerty") == [name for name in everything if name in "qwerty"]


def test_docstrings_are_parted_from_code(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Top."""\nclass A:\n    """Of A."""\n    def f(self):\n        """Of f."""\n'
    )
    code = build_corpus._code_without_docstrings(path)
    assert ast.dump(ast.parse(code)) == ast.dump(
        ast.parse("class A:\n    def f(self):\n        pass")
    )
    docs = build_corpus._docstrings_of(path, "m")
    assert docs.split() == ["m", "Top.", "m.A", "Of", "A.", "m.A.f", "Of", "f."]


def test_text_that_is_not_utf8_or_not_there_is_left_out(tmp_path):
    path = tmp_path / "latin.h"
    path.write_bytes(b"caf\xe9")
    assert build_corpus.read_text(path) == ""
    assert build_corpus.read_text(tmp_path / "missing.h") == ""


def test_generated_headers_are_left_out(tmp_path):
    path = tmp_path / "a.h"
    path.write_text("// @" + "generated by torchgen\nint x;\n")
    assert build_corpus._written_by_hand(path) == ""
    path.write_text("int x;\n")
    assert build_corpus._written_by_hand(path) == "int x;\n"
