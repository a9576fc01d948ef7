"""Reads documents from files of every kind, in parts that can be read separately.

The kinds are those that Hugging Face `datasets` reads from disk. Lines are read by the standard
library, which can tell the position of a bad one, columns by pyarrow, and folders of `datasets` by
`datasets`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import COMPRESSED, BadDocument, parse_object, read_lines, text_of

Kind = Literal["json", "text", "parquet", "arrow"]
SampleBy = Literal["line", "paragraph", "document"]

_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Document:
    """A document, and the bytes that it takes in its file, if known."""

    text: str
    bytes: int


@dataclass(frozen=True)
class Part:
    """A piece of a file that can be read separately.

    Attributes:
        start, stop: bytes of a plain file of lines, row groups of Parquet, or rows of an Arrow
            folder. `stop` None: to the end.
        bytes: its approximate size in the file.
    """

    path: Path
    start: int
    stop: int | None
    bytes: int


@dataclass(frozen=True)
class Reading:
    """The options for reading documents from files.

    Attributes:
        field: the name of the field or column that holds the text.
        sample_by: the unit of a text file that is one document.
    """

    field: str
    sample_by: SampleBy | None = None


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a file by its suffix; None if it cannot be read."""
    if path.is_dir():
        return "arrow" if is_dataset_folder(path) else None
    inner = Path(path.stem) if path.suffix in COMPRESSED else path
    kind = _SUFFIXES.get(inner.suffix)
    return None if kind == "parquet" and path.suffix in COMPRESSED else kind


def is_dataset_folder(path: Path) -> bool:
    """Return whether the folder was written by `datasets` (``Dataset.save_to_disk``)."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def parts_of(path: Path, part_bytes: int) -> list[Part]:
    """Divide a file into parts of about `part_bytes` each, the same on every machine.

    Raises:
        InputError: the package that reads its kind is missing.
    """
    kind = kind_of(path)
    if kind == "parquet":
        return _parts_of_parquet(path, part_bytes)
    if kind == "arrow":
        return _parts_of_folder(path, part_bytes)
    size = path.stat().st_size
    if path.suffix in COMPRESSED or kind == "text":
        return [Part(path, 0, None, size)]
    starts = range(0, size, part_bytes)
    return [Part(path, at, min(at + part_bytes, size), min(part_bytes, size - at)) for at in starts]


def documents(part: Part, reading: Reading) -> Iterator[Document | BadDocument]:
    """Yield the part's documents, and for each bad one the BadDocument that says what is wrong.

    Raises:
        InputError: the file cannot be read at all, or only with a choice of `sample_by`.
    """
    try:
        kind = kind_of(part.path)
        if kind == "parquet":
            yield from _parquet(part, reading.field)
        elif kind == "arrow":
            yield from _folder(part, reading.field)
        elif kind == "text":
            yield from _text(part, reading.sample_by)
        else:
            yield from _json(part, reading.field)
    except BadDocument as error:  # the rest of the file cannot be read
        yield error


# Lines -------------------------------------------------------------------------------------


def _json(part: Part, field: str) -> Iterator[Document | BadDocument]:
    example = f'{{"{field}": ...}}'
    for line in read_lines(part.path, part.start, part.stop):
        try:
            content = parse_object(line, example)
            yield Document(text_of(content, field, line, "--text_field"), len(line.content))
        except BadDocument as error:
            yield error


def _text(part: Part, sample_by: SampleBy | None) -> Iterator[Document | BadDocument]:
    if sample_by is None:
        raise InputError(
            f"{part.path}: say with --sample_by what one document is in a text file: line, "
            f"paragraph or document (the whole file)"
        )
    lines: list[bytes] = []
    last = 0
    for line in read_lines(part.path, blank=True):
        last, ends = line.number, sample_by == "paragraph" and not line.content.strip()
        if not ends:
            lines.append(line.content)
        if lines and (ends or sample_by == "line"):
            yield _decoded(part.path, last - ends, lines, whole=False)
            lines = []
    if lines:
        yield _decoded(part.path, last, lines, whole=sample_by == "document")


def _decoded(path: Path, last: int, lines: list[bytes], whole: bool) -> Document | BadDocument:
    """Decode consecutive lines, the last of which has number `last`, as one document."""
    content = b"".join(lines)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        number = last - len(lines) + 1 + content[: error.start].count(b"\n")
        return BadDocument(
            "invalid UTF-8", f"{path}: line {number}: invalid UTF-8; convert the file to UTF-8"
        )
    return Document(text if whole else text.rstrip("\r\n"), len(content))


# Columns -----------------------------------------------------------------------------------


def _parts_of_parquet(path: Path, part_bytes: int) -> list[Part]:
    try:
        metadata = _parquet_file(path).metadata
    except BadDocument:
        return [Part(path, 0, None, path.stat().st_size)]  # reading it will report the damage
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    parts, start = [], 0
    for stop in range(1, len(sizes) + 1):
        size = sum(sizes[start:stop])
        if size >= part_bytes or stop == len(sizes):
            parts.append(Part(path, start, stop, size))
            start = stop
    return parts


def _parquet(part: Part, field: str) -> Iterator[Document | BadDocument]:
    file = _parquet_file(part.path)
    groups = range(part.start, file.metadata.num_row_groups if part.stop is None else part.stop)
    _check_column(part.path, file.schema_arrow.names, field)
    row = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
    try:
        for batch in file.iter_batches(row_groups=list(groups), columns=[field]):
            yield from _rows(part.path, row, batch.column(0).to_pylist(), field)
            row += len(batch)
    except Exception as error:  # pyarrow's have no common base with OSError
        raise _damaged(part.path, error) from error


def _parquet_file(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing(path) from error
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _damaged(path, error) from error


def _parts_of_folder(path: Path, part_bytes: int) -> list[Part]:
    try:
        saved = _saved_dataset(path)
    except BadDocument:
        return [Part(path, 0, None, 1)]
    rows = len(saved)
    size = max(saved.data.nbytes * rows // max(len(saved.data), 1), 1)  # rows may be selected
    step = max(rows * part_bytes // size, 1)
    starts = range(0, max(rows, 1), step)
    return [
        Part(path, at, min(at + step, rows), size * (min(at + step, rows) - at) // max(rows, 1))
        for at in starts
    ]


def _folder(part: Part, field: str) -> Iterator[Document | BadDocument]:
    saved = _saved_dataset(part.path)
    _check_column(part.path, saved.column_names, field)
    saved = saved.with_format(None).select_columns([field])
    stop = len(saved) if part.stop is None else part.stop
    for row in range(part.start, stop, 1000):
        values = saved[row : min(row + 1000, stop)][field]
        yield from _rows(part.path, row, values, field)


def _saved_dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise _missing(path) from error
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:
        raise _damaged(path, error) from error


def _rows(
    path: Path, first: int, values: Iterable[Any], field: str
) -> Iterator[Document | BadDocument]:
    for number, value in enumerate(values, start=first + 1):
        try:
            text = text_of({field: value}, field, f"{path}: row {number}:", "--text_field")
            yield Document(text, len(text))
        except BadDocument as error:
            yield error


def _check_column(path: Path, names: list[str], field: str) -> None:
    if field not in names:
        raise BadDocument(
            "missing field",
            f"{path}: no column {field!r} among {', '.join(map(repr, names)) or 'none'}; name the "
            f"column that holds the text with --text_field",
        )


def _missing(path: Path) -> InputError:
    return InputError(
        f"{path}: Parquet and Arrow are read by Hugging Face datasets; pip install "
        f"'megatron_tikmix[datasets]', or convert it to JSON lines"
    )


def _damaged(path: Path, error: Exception) -> BadDocument:
    problem = " ".join(str(error).split())[:200] or type(error).__name__
    return BadDocument("damaged file", f"{path}: truncated or damaged ({problem}); fetch it again")
