"""Build a small corpus of six domains from text that is already on this machine.

Nothing is downloaded: the text comes from Python's standard library, from the headers that
come with torch, and from the installed packages' metadata.

  python_code     the standard library's sources, docstrings and comments removed
  python_docs     its docstrings, and the language reference that comes with pydoc
  cpp_headers     the C++ headers that come with torch, generated ones left out
  package_prose   installed packages' long descriptions and licence texts
  unicode_tables  character tables: low-value text
  noise           base64 of random bytes: text without any value

Each domain is written as OUTPUT/<domain>/train.jsonl and OUTPUT/<domain>/validation.jsonl,
one {"text": ..., "source": ...} a line. The same machine and seed give the same bytes.
"""

import argparse
import ast
import base64
import hashlib
import html.entities
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from megatron_tikmix.errors import InputError

PIECE_BYTES = 16_000
"""Longer documents are cut into pieces."""
SHORTEST_TEXT = 200
"""Shorter documents are left out; shorter paragraphs may be repeated."""
LARGEST_SHARE = 100
"""No document gives more than this part of a full domain, or a few would speak for it all."""
FEWEST_VALIDATION_DOCUMENTS = 5
SMALLEST_DOMAIN = 100_000
DEFAULT_NOISE_BYTES = 1_000_000
SCARCE_BYTES = 300_000

# A recipe lists a domain's documents by source, and reads one only when it is called for.
Read = Callable[[], str]
Recipe = Callable[[], Mapping[str, Read]]


@dataclass(frozen=True)
class Document:
    """A document's pieces, which stay on the same side of the train/validation split."""

    source: str
    pieces: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(len(piece.encode()) for piece in self.pieces)


# The six recipes ---------------------------------------------------------------------------

STDLIB = Path(sysconfig.get_path("stdlib"))
_NOT_STDLIB_TEXT = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_code() -> Mapping[str, Read]:
    return {name: partial(_code_without_docstrings, path) for name, path in stdlib_sources()}


def python_docs() -> Mapping[str, Read]:
    from pydoc_data.topics import topics

    documents: dict[str, Read] = {
        name: partial(_docstrings_of, path, name.removesuffix(".py").replace("/", "."))
        for name, path in stdlib_sources()
    }
    return documents | {
        f"pydoc_data/topics.py:{topic}": partial(str, text) for topic, text in topics.items()
    }


def cpp_headers() -> Mapping[str, Read]:
    torch = importlib.util.find_spec("torch")  # found, not imported: that would take seconds
    if torch is None or not torch.submodule_search_locations:
        raise InputError("cpp_headers: torch is not installed; install it with pip install torch")
    include = Path(torch.submodule_search_locations[0]) / "include"
    return {
        path.relative_to(include).as_posix(): partial(_written_by_hand, path)
        for path in include.rglob("*")
        if path.suffix in {".h", ".hpp", ".cuh"}
    }


def package_prose() -> Mapping[str, Read]:
    documents: dict[str, Read] = {}
    # Not all of sys.path: libraries add folders of their own to it as they are imported.
    installed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    for package in importlib.metadata.distributions(path=installed):
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"] or "").lower()
        # Our own README would make what is measured on this corpus depend on its wording.
        if name in ("", "megatron-tikmix") or f"{name}/METADATA" in documents:
            continue
        documents[f"{name}/METADATA"] = partial(_long_description, package)
        for file in package.files or ():
            in_metadata = file.parts[0].endswith((".dist-info", ".egg-info"))
            if in_metadata and re.match(r"(?i)licen[cs]e|copying|notice|authors", file.name):
                path = Path(str(package.locate_file(file)))
                documents["/".join((name, *file.parts[1:]))] = partial(read_text, path)
    return documents


def unicode_tables() -> Mapping[str, Read]:
    documents: dict[str, Read] = {
        f"encodings/{path.name}": partial(read_text, path)
        for path in (STDLIB / "encodings").glob("*.py")
    }
    documents["html/entities.py"] = partial(read_text, Path(html.entities.__file__))
    for first in range(0, sys.maxunicode + 1, 256):
        documents[f"unicodedata/{first:06X}"] = partial(_character_table, range(first, first + 256))
    return documents


def noise(seed: int, max_bytes: int) -> Mapping[str, Read]:
    """Documents of 2 to 6 kB, as many as can be needed however small their part must be."""
    names = (f"noise/{number:06d}" for number in range(max_bytes // 2000 + 2 * LARGEST_SHARE))
    return {name: partial(_noise, f"{seed} {name}") for name in names}


def stdlib_sources() -> Iterator[tuple[str, Path]]:
    for path in STDLIB.rglob("*.py"):
        name = path.relative_to(STDLIB)
        # _sysconfigdata* lists this machine's compiler flags and folders.
        if _NOT_STDLIB_TEXT.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield name.as_posix(), path


def read_text(path: Path) -> str:
    """A file's text; nothing if it is not UTF-8 or not there (a package's list can be wrong)."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # old escapes in old modules
        try:
            return ast.parse(read_text(path))
        except SyntaxError:  # a template, or code for another Python
            return ast.Module(body=[], type_ignores=[])


def _code_without_docstrings(path: Path) -> str:
    module = _parse(path)
    for node in ast.walk(module):
        if isinstance(node, ast.Module | Definition) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(module)


def _docstrings_of(path: Path, module_name: str) -> str:
    def walk(node: ast.AST, name: str) -> Iterator[str]:
        if isinstance(node, ast.Module | Definition) and (text := ast.get_docstring(node)):
            yield f"{name}\n\n{text}\n"
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                inner = f"{name}.{child.name}" if isinstance(child, Definition) else name
                yield from walk(child, inner)

    return "\n".join(walk(_parse(path), module_name))


def _written_by_hand(path: Path) -> str:
    text = read_text(path)
    generated = re.search(r"(?i)@generated|generated by|do not edit", text[:2000])
    return "" if generated else text


def _long_description(package: importlib.metadata.Distribution) -> str:
    try:
        text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    except UnicodeDecodeError:
        return ""
    return text.partition("\n\n")[2]  # after the header


def _character_table(code_points: range) -> str:
    """Lines in the manner of UnicodeData.txt, without the thousands of computed names."""
    lines = []
    for character in map(chr, code_points):
        name = unicodedata.name(character, "")
        if name and not name.startswith(("CJK UNIFIED", "HANGUL SYLLABLE")):
            category = unicodedata.category(character)
            parts = unicodedata.decomposition(character)
            lines.append(f"{ord(character):04X};{name};{category};{parts}")
    return "\n".join(lines)


def _noise(seed: str) -> str:
    generator = random.Random(seed)  # noqa: S311 - noise, not a secret
    return base64.encodebytes(generator.randbytes(generator.randrange(1500, 4500))).decode()


# Choosing, cutting, splitting --------------------------------------------------------------


def choose(candidates: Mapping[str, Read], max_bytes: int, seed: int) -> Iterator[Document]:
    """Documents in an order drawn from `seed`, until there are `max_bytes` of them.

    A document's place in that order depends on its own source alone.
    """

    def place(source: str) -> bytes:
        return hashlib.sha256(f"{seed} {source}".encode()).digest()

    total, texts, paragraphs = 0, set[str](), set[str]()
    for source in sorted(candidates, key=place):
        if total >= max_bytes:
            return
        text = without_repeats(candidates[source](), paragraphs)
        if len(text) < SHORTEST_TEXT or not is_unicode(text):
            continue
        beginning = next(cut(text, max_bytes // LARGEST_SHARE))
        pieces = dict.fromkeys(piece for piece in cut(beginning, PIECE_BYTES) if piece not in texts)
        if pieces:
            texts.update(pieces)
            document = Document(source, tuple(pieces))
            total += document.bytes
            yield document


def without_repeats(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs that are already in `seen`, which takes in the new ones.

    Licences and chapters of the language reference hold each other's paragraphs. The same
    one on both sides of the split would make validation a test of memory. Short paragraphs
    are left alone, so that code keeps its shape.
    """
    kept = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        words = " ".join(paragraph.lower().split())
        if len(words) < SHORTEST_TEXT or words not in seen:
            kept.append(paragraph)
            seen.add(words)
    return "\n\n".join(kept)


def is_unicode(text: str) -> bool:
    """False for text with half a surrogate pair, which a docstring's escapes can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def cut(text: str, limit: int) -> Iterator[str]:
    """Consecutive pieces of at most `limit` bytes, ending at a blank line, line or word.

    Such an end is looked for in the second half of a piece, so that pieces do not get tiny.
    """
    data = text.encode()
    start = 0
    while len(data) - start > limit:
        stop = start + limit
        for separator in (b"\n\n", b"\n", b" "):
            found = data.rfind(separator, start + limit // 2, stop)
            if found >= 0:
                stop = found + len(separator)
                break
        else:
            while data[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
        yield data[start:stop].decode()
        start = stop
    if start < len(data):
        yield data[start:].decode()


def split(documents: list[Document], fraction: float) -> dict[str, list[Document]]:
    """The first documents, up to `fraction` of all bytes, are for validation."""
    wanted = fraction * sum(document.bytes for document in documents)
    count, size = 0, 0
    while count < len(documents) and (size < wanted or count < FEWEST_VALIDATION_DOCUMENTS):
        size += documents[count].bytes
        count += 1
    return {"train": documents[count:], "validation": documents[:count]}


def write_jsonl(path: Path, documents: list[Document]) -> None:
    """Write the file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            for piece in document.pieces:
                line = {"text": piece, "source": document.source}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(unfinished, path)


# The command -------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="""\
example:
  python tools/build_corpus.py --output data/corpus
  tikmix preprocess --input data/corpus --output data/tokens \\
      --train_tokenizer --vocab_size 2048
""",
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add("--seed", type=int, default=1234, help="draws sample, split and noise (default: 1234)")
    add(
        "--max_bytes_per_domain",
        type=int,
        default=2_500_000,
        metavar="N",
        help="size of a domain, both splits together (default: 2500000)",
    )
    add(
        "--noise_bytes",
        type=int,
        metavar="N",
        help="size of the noise domain, 0 for none (default: 1000000, or "
        "max_bytes_per_domain if that is less)",
    )
    add(
        "--validation_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="share of each domain's bytes that is held out (default: 0.1)",
    )
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Fill in the size of the noise domain; refuse what cannot work."""
    if arguments.noise_bytes is None:
        arguments.noise_bytes = min(DEFAULT_NOISE_BYTES, arguments.max_bytes_per_domain)
    for name in ("max_bytes_per_domain", "noise_bytes"):
        size = getattr(arguments, name)
        if size < SMALLEST_DOMAIN and not (name == "noise_bytes" and size == 0):
            raise InputError(f"--{name} ({size}) must be at least {SMALLEST_DOMAIN}")
    if not 0 < arguments.validation_fraction <= 0.5:
        raise InputError(
            f"--validation_fraction ({arguments.validation_fraction}) must be above 0, at most 0.5"
        )
    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} is a file; give a folder")


def domains(arguments: argparse.Namespace) -> dict[str, tuple[Recipe, int]]:
    """Every domain's recipe and size."""
    found_here = (python_code, python_docs, cpp_headers, package_prose, unicode_tables)
    size, noise_size = arguments.max_bytes_per_domain, arguments.noise_bytes
    recipes: dict[str, tuple[Recipe, int]] = {
        recipe.__name__: (recipe, size) for recipe in found_here
    }
    if noise_size:
        recipes["noise"] = (partial(noise, arguments.seed, noise_size), noise_size)
    return recipes


def build(arguments: argparse.Namespace) -> None:
    check(arguments)
    table = Table("domain", title=escape(f"Corpus in {arguments.output}"))
    for heading in ("train texts", "bytes", "validation texts", "bytes"):
        table.add_column(heading, justify="right")
    warnings_at_end = []
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        for name, (recipe, max_bytes) in domains(arguments).items():
            task = progress.add_task(name, total=max_bytes)
            documents = []
            for document in choose(recipe(), max_bytes, arguments.seed):
                documents.append(document)
                progress.advance(task, document.bytes)
            splits = split(documents, arguments.validation_fraction)
            if not splits["train"]:
                raise InputError(
                    f"{name}: this machine has only {len(documents)} documents for it; use a "
                    "Python installed with its sources, and all of this package's requirements"
                )
            row = [name]
            for split_name, chosen in splits.items():
                write_jsonl(arguments.output / name / f"{split_name}.jsonl", chosen)
                row.append(f"{sum(len(document.pieces) for document in chosen):,}")
                row.append(f"{sum(document.bytes for document in chosen):,}")
            table.add_row(*row)
            size = sum(document.bytes for document in documents)
            if size < min(SCARCE_BYTES, 0.9 * max_bytes):
                warnings_at_end.append(f"{name}: this machine has only {size:,} bytes for it")
    Console().print(table)
    for warning in warnings_at_end:
        print(f"warning: {warning}", file=sys.stderr)


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
