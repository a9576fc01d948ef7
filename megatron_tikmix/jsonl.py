"""JSON lines, plain or compressed: one object a line, with a clear error for everything else.

The files that a run appends to are written a whole line at a time, and flushed, so they can be read
while it goes on, and a killed run loses at most the line that it was writing.
"""

import bz2
import gzip
import io
import json
import lzma
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_tikmix.errors import InputError

Row = dict[str, Any]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files, which are unpacked as they are read."""


class BadDocument(InputError):
    """A document that is malformed or lacks its text.

    Attributes:
        reason: the kind of fault in two or three words, for counting.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Line:
    """A line that is not blank."""

    path: Path
    first: int
    """Offset in bytes of the first line that was read."""

    number: int
    """Number of this line, counted from that first one, which is 1."""

    content: bytes

    def __str__(self) -> str:
        """Return file and line number, for messages; it counts lines before `first`, so is slow."""
        before = 0
        if self.first:
            with self.path.open("rb") as file:
                left = self.first
                while left:
                    block = file.read(min(left, 1 << 24))
                    before += block.count(b"\n")
                    left -= len(block)
        return f"{self.path}: line {before + self.number}:"


def read_lines(
    path: Path, start: int = 0, stop: int | None = None, *, blank: bool = False
) -> Iterator[Line]:
    """Yield the lines of a file, unpacked if its name says that it is compressed.

    Args:
        start: only lines that begin at this byte or later. Files that are not compressed only.
        stop: only lines that begin before this byte. None: to the end.
        blank: yield blank lines too.

    Raises:
        BadDocument: the compressed data is truncated or damaged, after the lines before it.
        InputError: the file cannot be read.
    """
    number = 0
    try:
        with open_binary(path) as file:
            if start:
                file.seek(start - 1)
                start += len(file.readline()) - 1  # skip the line that began before `start`
            at = start
            for number, content in enumerate(file, start=1):
                if stop is not None and at >= stop:
                    return
                at += len(content)
                if blank or content.strip():
                    yield Line(path, start, number, content)
    except _damage(path) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise BadDocument(
            "damaged file",
            f"{path}: truncated or damaged after line {number} ({problem}); fetch or pack it again",
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def open_binary(path: Path) -> BinaryIO:
    """Open a file for its bytes, unpacked if it is compressed.

    Raises:
        InputError: the package that reads ``.zst`` is missing.
    """
    openers: dict[str, Callable[..., Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zst,
    }
    file: BinaryIO = openers.get(path.suffix, lambda path: path.open("rb"))(path)
    return file


def parse_object(line: Line, example: str) -> dict[str, Any]:
    """Return the JSON object in a line.

    Args:
        example: a description of a good line, for the message.

    Raises:
        BadDocument: names the file, the line and what is wrong there.
    """
    try:
        content = json.loads(line.content.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadDocument(
            "invalid UTF-8",
            f"{line} invalid UTF-8 at its byte {error.start + 1}; convert the file to UTF-8",
        ) from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at its character {error.colno}"
        raise BadDocument(
            "malformed JSON", f"{line} malformed JSON: {problem}; write one object a line"
        ) from error
    except (ValueError, RecursionError) as error:  # nested too deep, or a number of 5,000 digits
        raise BadDocument(
            "malformed JSON", f"{line} unreadable JSON: {error}; simplify it"
        ) from error
    if not isinstance(content, dict):
        raise BadDocument("not an object", f"{line} not a JSON object; write {example}")
    return content


def read_objects(path: Path, example: str, *, torn_tail: bool = False) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, one a line.

    Args:
        example: a description of a good line, for the message.
        torn_tail: drop an incomplete last line, as a killed run leaves it.

    Raises:
        BadDocument: names the file, the line and what is wrong there.
        InputError: the file cannot be read.
    """
    objects = []
    for line in read_lines(path):
        try:
            objects.append(parse_object(line, example))
        except BadDocument:
            if torn_tail and not line.content.endswith(b"\n"):
                break
            raise
    return objects


def read_jsonl(path: str | Path) -> list[Row]:
    """Return all objects of a run's file; none if there is no file.

    An incomplete last line, as a killed run leaves it, is left out.

    Raises:
        InputError: another line is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    return read_objects(path, "one object a line, or delete that line", torn_tail=True)


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` as one line of JSON (see :func:`json_line`), and sync it to the disk.

    Raises:
        OSError: it cannot be written (the disk is full, say); the file is then unchanged.
    """
    with open(path, "a+b", buffering=0) as file:
        _mend_torn_tail(file)
        end = file.seek(0, os.SEEK_END)
        try:
            line = memoryview(json_line(row).encode("ascii"))
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def json_line(row: Mapping[str, Any]) -> str:
    """Return `row` as a line of JSON with its line end. Numbers that are not finite become null."""
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def text_of(content: dict[str, Any], field: str, where: object, option: str) -> str:
    """Return the text in a field of a document.

    Args:
        where: the document's place, in words, for messages.
        option: the option or setting that names the field, for messages.

    Raises:
        BadDocument: there is no such field, or it holds no valid text.
    """
    if field not in content:
        raise BadDocument(
            "missing field",
            f"{where} no field {field!r} among {', '.join(map(repr, content)) or 'none'}; "
            f"name the field that holds the text with {option}",
        )
    text = content[field]
    if not isinstance(text, str):
        kind = json.dumps(text, default=repr)[:40]
        raise BadDocument(
            "not a string", f"{where} field {field!r} must be a string, and is {kind}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(
            "invalid UTF-8",
            f"{where} field {field!r} holds half a surrogate pair at character {error.start + 1}, "
            "which is not text; remove it",
        ) from error
    return text


def _damage(path: Path) -> tuple[type[Exception], ...]:
    """Return the exceptions that reading damaged compressed data raises."""
    known: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError)
    # The readers of .bz2 and .zst raise plain OSErrors.
    return (*known, OSError) if path.suffix in (".bz2", ".zst") else known


def _open_zst(path: Path) -> io.BufferedReader:
    # Not by zstandard, which does not notice that a file is truncated.
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(
            f"{path}: reading .zst needs pyarrow; pip install 'megatron_tikmix[datasets]', or "
            f"unpack the file"
        ) from error
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _mend_torn_tail(file: BinaryIO) -> None:
    """Complete or remove an incomplete last line, so that no row is appended to it."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if not _is_object(tail):
        file.truncate(end - len(tail))
    else:
        file.write(b"\n")  # only the line end is missing


def _is_object(line: bytes) -> bool:
    """Return whether a line holds a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:  # the base of JSONDecodeError and UnicodeDecodeError
        return False


def _plain(value: Any) -> Any:
    """Return `value` in the types of JSON, which has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
