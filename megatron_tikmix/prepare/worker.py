"""A worker process, which holds one tokenizer and writes the parts that it is given."""

import os
from pathlib import Path
from typing import Any

from megatron_tikmix.errors import InputError
from megatron_tikmix.prepare.parts import Encoding, PartWriter
from megatron_tikmix.prepare.readers import Part

_writer: PartWriter
_done: Any  # bytes that all workers have done, a shared integer with a lock


def begin(encoding: Encoding, threads: int, done: Any) -> None:
    """Prepare this process; to be called once, before its first part."""
    global _writer, _done
    limit_threads(threads)
    _writer, _done = PartWriter(encoding, threads), done


def write(part: Part, prefix: Path) -> str | None:
    """Write a part; return None, or one sentence on what is wrong with it."""

    def advance(count: int) -> None:
        with _done.get_lock():
            _done.value += count

    try:
        _writer.write(part, prefix, advance)
    except InputError as error:
        return str(error)
    return None


def limit_threads(threads: int) -> None:
    """Set the number of threads that encode in this process; call it before the first encoding."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
