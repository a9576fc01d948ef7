"""Finds the files that hold the text of each split of each domain."""

import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tikmix.data.domains import check_name
from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import COMPRESSED
from megatron_tikmix.prepare.readers import is_dataset_folder, kind_of

# A split's name has no underscore, so that <domain>_<split> is unambiguous.
SPLIT_NAME = r"[A-Za-z0-9.-]+"


@dataclass(frozen=True)
class Source:
    """The text of one split of one domain: files, and folders of Hugging Face `datasets`."""

    domain: str
    split: str
    files: tuple[Path, ...]

    @property
    def key(self) -> tuple[str, str]:
        return self.domain, self.split

    @property
    def prefix(self) -> str:
        return f"{self.domain}_{self.split}"


def parse_named(option: str, value: str) -> tuple[str, str, str] | None:
    """Split ``DOMAIN:SPLIT=WHAT`` into its parts; return None if `value` is not of that form.

    Raises:
        InputError: the domain or the split cannot be part of a file name.
    """
    named = re.fullmatch(r"([^:=/]+):([^:=/]+)=(.+)", value, re.DOTALL)
    if named is None:
        return None
    domain = check_name(named[1], f"{option} {value}: domain")
    return domain, check_name(named[2], f"{option} {value}: split", SPLIT_NAME), named[3]


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """Return the sources that ``--input`` values name, in the order given; a folder's by name.

    Raises:
        InputError: there is nothing of that name, or it is not of a kind that can be read.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for value in inputs:
        named = parse_named("--input", value)
        if named:
            domain, split, pattern = named
            found.setdefault((domain, split), []).extend(_matching(value, pattern))
        else:
            for domain, split, paths in _in_folder(Path(value)):
                found.setdefault((domain, split), []).extend(paths)
    for (domain, split), paths in found.items():
        for path, times in Counter(paths).items():
            if times > 1:
                raise InputError(f"{path} is given twice for {domain}:{split}; give it once")
            if path.is_file() and path.stat().st_size == 0:
                raise InputError(f"{path} is empty; remove it, or write its documents to it")
    return [Source(*key, tuple(paths)) for key, paths in found.items()]


def _matching(value: str, pattern: str) -> list[Path]:
    """Return the files of ``DOMAIN:SPLIT=PATTERN``: one file, all of a folder, or all matches."""
    paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
    if not paths:
        raise InputError(f"--input {value}: no such file, and no file matches the pattern")
    found = [path for one in paths for path in _files(one)]
    if not found:
        raise InputError(f"--input {value}: no file in {paths[0]} that can be read; {KINDS}")
    for path in found:
        if kind_of(path) is None:
            raise InputError(f"--input {value}: {path} is of no kind that can be read; {KINDS}")
    return found


KINDS = (
    "files are JSON lines (.jsonl, .json, .ndjson), text (.txt, .text), both also compressed "
    f"({', '.join(COMPRESSED)}), Parquet (.parquet), or folders that Hugging Face datasets saved"
)


def _files(path: Path) -> list[Path]:
    """Return `path`, or if it is a folder all readable files anywhere in it."""
    if not path.is_dir() or is_dataset_folder(path):
        return [path]
    found: list[Path] = []
    for inner in sorted(path.glob("[!.]*")):
        if inner.is_dir():
            found += _files(inner)
        elif kind_of(inner) is not None:
            found.append(inner)
    return found


def _in_folder(folder: Path) -> Iterator[tuple[str, str, list[Path]]]:
    """Yield (domain, split, files) of each ``<domain>/<split>.jsonl``, or other kind, or folder."""
    if not folder.is_dir():
        raise InputError(
            f"--input {folder}: no such folder; give a folder, or DOMAIN:SPLIT=FILE for one file"
        )
    empty = True
    for path in sorted(folder.glob("[!.]*/[!.]*")):
        paths = _files(path) if path.is_dir() else [path] if kind_of(path) else []
        if not paths:
            continue
        empty = False
        domain = check_name(path.parent.name, f"{path}: domain")
        name = path.name if path.is_dir() else path.name.split(".")[0]
        if path.is_file() and path.suffix not in COMPRESSED:
            name = path.stem
        yield domain, check_name(name, f"{path}: split", SPLIT_NAME), paths
    if empty:
        raise InputError(f"--input {folder}: no <domain>/<split>.jsonl file in it; {KINDS}")
