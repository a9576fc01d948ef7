"""JSON lines that a run appends to and everything else reads: one object a line.

A line is appended whole and flushed, so a reader need not wait until the run is over, and a killed
run loses at most the line that it was writing.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_tikmix.errors import InputError

Row = dict[str, Any]


def append_jsonl(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` as one line of JSON, and have it on disk; see :func:`json_line`.

    Raises:
        OSError: it cannot be written (the disk is full, say); the file is then what it was.
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


def read_jsonl(path: str | Path) -> list[Row]:
    """Return every object of the file. A last line torn by a kill is dropped; no file has no rows.

    Raises:
        InputError: another line is no JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is None:
            raise InputError(
                f"{path}, line {number}: not a JSON object; mend or delete that line, "
                "every line of this file must be one."
            )
        rows.append(row)
    last = _parse(tail)
    return rows if last is None else [*rows, last]


def _mend_torn_tail(file: BinaryIO) -> None:
    """Make the file end with a whole line, so that no row is appended to a torn one."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    if _parse(tail) is None:
        file.truncate(end - len(tail))
    else:
        file.write(b"\n")  # whole, but for its line end


def _parse(line: bytes) -> Row | None:
    """Return the object that a line holds, or None."""
    try:
        row = json.loads(line)
    except ValueError:  # the base of JSONDecodeError and UnicodeDecodeError
        return None
    return row if isinstance(row, dict) else None


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
