"""Checks of Megatron's ``.bin/.idx`` pairs without reading the tokens.

megatron-core's own reader is not used here: it imports torch, maps both files, fails on a
truncated index with a bare assertion or numpy's "buffer is smaller than requested size", and on a
truncated ``.bin`` only in the middle of training.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tikmix.errors import InputError

AGAIN = "run tikmix preprocess again"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document bounds
# megatron-core's codes of integer types, all little-endian.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LOOKED_AT = 1 << 20  # tokens whose ids are checked
_BLOCKS, _BLOCK_BYTES = 8, 4096  # what a checksum reads of each file


@dataclass(frozen=True)
class TokenFiles:
    """The size and token type of a pair of files, as its ``.idx`` gives them."""

    prefix: Path
    documents: int
    tokens: int
    """Number of tokens, with end-of-document tokens."""

    dtype: np.dtype

    @classmethod
    def read(cls, prefix: Path, named_by: str) -> "TokenFiles":
        """Read the header of ``<prefix>.idx``, and check it against both files' sizes.

        Args:
            named_by: the file or field that names them, for messages.

        Raises:
            InputError: one of them is missing or damaged, or they do not fit each other.
        """
        bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (idx_path, bin_path):
            if not path.is_file():
                raise InputError(f"{path} is missing, and {named_by} names it; {AGAIN}")
        documents, tokens, dtype = _read_index(idx_path)
        _check_size(bin_path, tokens * dtype.itemsize, "its .idx says")
        return cls(prefix, documents, tokens, dtype)

    def checksum(self) -> str:
        """Return the SHA-256 of both files' sizes and of blocks spread evenly over each.

        Not of every byte, since every rank computes it before a run starts. Files made from other
        text or with another tokenizer differ everywhere.
        """
        digest = hashlib.sha256()
        for suffix in ("idx", "bin"):
            path = Path(f"{self.prefix}.{suffix}")
            size = path.stat().st_size
            digest.update(f"{suffix} {size}".encode())
            with path.open("rb") as file:
                last = max(size - _BLOCK_BYTES, 0)
                for place in sorted({last * i // (_BLOCKS - 1) for i in range(_BLOCKS)}):
                    file.seek(place)
                    digest.update(file.read(_BLOCK_BYTES))
        return digest.hexdigest()[:32]

    def check_ids(self, vocab_size: int, vocabulary: str) -> None:
        """Check that the first million tokens are below `vocab_size`.

        Args:
            vocabulary: the owner of `vocab_size`, for the message.

        Raises:
            InputError: one is not, so the tokens were made with another tokenizer.
        """
        path = Path(f"{self.prefix}.bin")
        count = min(self.tokens, _LOOKED_AT)
        ids = np.fromfile(path, dtype=self.dtype, count=count)
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(wrong):
            raise InputError(
                f"{path}: token {wrong[0]:,} has id {ids[wrong[0]]}, and {vocabulary} has a "
                f"vocabulary of {vocab_size}; tokenise it with the same tokenizer"
            )


def _read_index(path: Path) -> tuple[int, int, np.dtype]:
    """Read documents, tokens and token type of an ``.idx``: header, lengths and last entries."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise InputError(f"{path} is not a Megatron index, or lost its first bytes; {AGAIN}")
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != 1 or code not in _DTYPES:
            raise InputError(
                f"{path} is of version {version} with token type {code}, which megatron-core "
                f"does not write for text; {AGAIN}"
            )
        # int32 lengths, int64 byte offsets into .bin, int64 document bounds.
        lengths_end = _HEADER.size + 4 * sequences
        offsets_end = lengths_end + 8 * sequences
        _check_size(path, offsets_end + 8 * bounds, "its header says")
        if sequences == 0 or bounds < 2:
            raise InputError(f"{path} holds no documents; give the domain text and {AGAIN}")
        lengths = np.memmap(file, dtype="<i4", mode="r", offset=_HEADER.size, shape=(sequences,))
        length, shortest, total = int(lengths[-1]), int(lengths.min()), int(lengths.sum(dtype=int))
        (offset,) = _read_at(file, offsets_end - 8, "<q")
        (last_bound,) = _read_at(file, offsets_end + 8 * (bounds - 1), "<q")
    dtype = np.dtype(_DTYPES[code])
    bin_bytes = offset + length * dtype.itemsize
    consistent = shortest >= 0 and total * dtype.itemsize == bin_bytes and last_bound == sequences
    if not consistent or offset < 0 or offset % dtype.itemsize:
        raise InputError(f"{path} contradicts itself; {AGAIN}")
    return bounds - 1, total, dtype


def _read_at(file: Any, position: int, form: str) -> tuple[int, ...]:
    file.seek(position)
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _check_size(path: Path, expected: int, authority: str) -> None:
    excess = path.stat().st_size - expected
    if excess:
        word = "longer" if excess > 0 else "shorter"
        raise InputError(f"{path} is {abs(excess)} bytes {word} than {authority}; {AGAIN}")
