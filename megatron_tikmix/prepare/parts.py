"""Encoding one part of a file to its own pair of token files: the unit of work and of restarts."""

import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tikmix.data.tokenizer import TokenizerFiles
from megatron_tikmix.jsonl import BadDocument
from megatron_tikmix.prepare.readers import Document, Part, Reading, documents

BATCH_CHARACTERS = 1 << 18  # what a thread encodes at a time; 100 bytes of memory a token
_FORMAT = 1  # of the output; changing it makes all output anew


@dataclass(frozen=True)
class Encoding:
    """Everything on which the bytes of the output depend, besides the text.

    Attributes:
        on_error: ``stop`` at a bad document, or ``skip`` and count it.
    """

    tokenizer: TokenizerFiles
    vocab_size: int
    eod: int
    reading: Reading
    on_error: Literal["stop", "skip"] = "stop"

    def describe(self) -> list[object]:
        """Return plain values that are equal for encodings that give the same tokens."""
        reading = dataclasses.asdict(self.reading)
        return [_FORMAT, self.tokenizer.checksum(), self.vocab_size, self.eod, reading]


@dataclass(frozen=True)
class Counts:
    """The numbers of documents, tokens and bytes of some text, and what was skipped of it."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Number of skipped documents, by reason."""

    examples: dict[str, str] = field(default_factory=dict)
    """A sentence on the first document skipped for each reason."""

    def __add__(self, other: "Counts") -> "Counts":
        reasons = {**self.skipped, **other.skipped}
        return Counts(
            self.documents + other.documents,
            self.empty + other.empty,
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            {r: self.skipped.get(r, 0) + other.skipped.get(r, 0) for r in reasons},
            {**other.examples, **self.examples},
        )


class PartWriter:
    """Encodes parts; there is one for each process."""

    def __init__(self, encoding: Encoding, threads: int) -> None:
        self._encoding = encoding
        self._tokenizer = encoding.tokenizer.load("--tokenizer")
        self._megatron = import_indexed_dataset()
        self._dtype = self._megatron.DType.optimal_dtype(encoding.vocab_size)
        self._batch_characters = BATCH_CHARACTERS * threads

    def write(self, part: Part, prefix: Path, advance: Callable[[int], None]) -> Counts:
        """Write ``<prefix>.bin/.idx``, and last ``<prefix>.json``, which marks them as complete.

        A part without documents has no ``.bin/.idx``.

        Args:
            advance: called with the number of bytes processed since the last call.

        Raises:
            BadDocument: a document is bad, and `on_error` is ``stop``.
        """
        unfinished = prefix.with_name(f"{prefix.name}.{os.getpid()}.tmp")
        files = [Path(f"{unfinished}.{suffix}") for suffix in ("bin", "idx", "json")]
        try:
            builder = self._megatron.IndexedDatasetBuilder(str(files[0]), dtype=self._dtype)
            counts, left = Counts(), part.bytes
            for batch, bad in self._batches(part):
                counts += bad + self._add(batch, builder)
                done = min(sum(document.bytes for document in batch), left)
                left -= done
                advance(done)
            advance(left)
            builder.finalize(str(files[1]))
            files[2].write_text(json.dumps(dataclasses.asdict(counts)), encoding="utf-8")
            for path in files[0 if counts.documents else 2 :]:
                os.replace(path, Path(f"{prefix}{path.suffix}"))
        finally:
            for path in files:
                path.unlink(missing_ok=True)
        return counts

    def _batches(self, part: Part) -> Iterator[tuple[list[Document], Counts]]:
        """Yield batches of documents, large enough for all threads, and count what is skipped."""
        batch: list[Document] = []
        bad, size = Counts(), 0
        for document in documents(part, self._encoding.reading):
            if isinstance(document, BadDocument):
                if self._encoding.on_error == "stop":
                    raise document
                bad += Counts(
                    skipped={document.reason: 1}, examples={document.reason: str(document)}
                )
                continue
            batch.append(document)
            size += len(document.text)
            if size >= self._batch_characters:
                yield batch, bad
                batch, bad, size = [], Counts(), 0
        yield batch, bad

    def _add(self, batch: list[Document], builder: Any) -> Counts:
        documents = tokens = 0
        # In parallel and outside the GIL; the result does not depend on the number of threads.
        for ids in self._tokenizer.encode([document.text for document in batch]):
            if ids:
                ids.append(self._encoding.eod)
                builder.add_document(np.array(ids, dtype=self._dtype), [len(ids)])
                documents += 1
                tokens += len(ids)
        return Counts(
            documents=documents,
            empty=len(batch) - documents,
            tokens=tokens,
            text_bytes=sum(len(document.text.encode()) for document in batch),
        )


def finished(prefix: Path) -> Counts | None:
    """Return the counts of a part that was written completely, else None."""
    try:
        return Counts(**json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def source_digest(files: tuple[Path, ...], encoding: Encoding) -> str:
    """Return a digest of the files' paths, sizes and times, and of the encoding."""
    listed = [
        (str(path), stat.st_size, stat.st_mtime_ns)
        for file in files
        for path in (sorted(p for p in file.rglob("*") if p.is_file()) if file.is_dir() else [file])
        for stat in [path.stat()]
    ]
    content = [encoding.describe(), encoding.on_error, listed]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def import_indexed_dataset() -> Any:
    """Import megatron-core's module late: it takes seconds, and bad input is to be found before."""
    with warnings.catch_warnings(action="ignore"):  # about packages that only a GPU needs
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
