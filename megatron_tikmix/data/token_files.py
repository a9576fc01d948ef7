"""Megatron's ``.bin/.idx`` pairs, looked at without reading the tokens.

megatron-core's own reader is not used for it: it imports torch, maps both files, fails on a
truncated index by a bare assertion or numpy's "buffer is smaller than requested size", and on a
truncated ``.bin`` only in the middle of training.
"""

import hashlib
import os
import struct
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError

AGAIN = "run tikmix preprocess again"

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document bounds
# megatron-core's codes of integer types, all little-endian.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LOOKED_AT = 1 << 20  # tokens whose ids are checked
_BLOCKS, _BLOCK_BYTES = 8, 4096  # of a fingerprint


@dataclass(frozen=True)
class TokenFiles:
    """The size and token type of a pair, as its ``.idx`` gives them."""

    prefix: Path
    documents: int
    tokens: int
    """End-of-document tokens included."""

    dtype: np.dtype

    @classmethod
    def read(cls, prefix: Path, named_by: str) -> "TokenFiles":
        """Look at ``<prefix>.bin`` and ``<prefix>.idx``.

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

    def fingerprint(self) -> str:
        """SHA-256 of both files' sizes and of blocks spread evenly over each.

        Not of every byte: a run looks at it on every rank before it starts. Files that were made
        again from other text or with another tokenizer differ everywhere.
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
        """Check that the first million tokens are below `vocab_size`, that of `vocabulary`.

        Raises:
            InputError: one is not: these tokens were made with another tokenizer.
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
    """Documents, tokens and token type, from an ``.idx``: header, lengths and last entries."""
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


# `.bin/.idx` pairs of which a bounded number is open at a time, over all streams of a process.


Opened = TypeVar("Opened")


class RecentlyUsed(Generic[Opened]):
    """A cache of the `limit` most recently used objects; dropping an object closes it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._objects: OrderedDict[Hashable, Opened] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Opened]) -> Opened:
        """Return the object of this key; make it if the cache does not hold it."""
        if key in self._objects:
            self._objects.move_to_end(key)
            return self._objects[key]
        while len(self._objects) >= self.limit:
            self._objects.popitem(last=False)
        self._objects[key] = made = make()
        return made

    def __len__(self) -> int:
        return len(self._objects)


class _OpenTokens:
    """An IndexedDataset, whose tokens are read, not mapped.

    Reading a mapped file that was cut short, or lies on a disk that fails, ends the process by
    SIGBUS without a word; here it raises an error that says where.
    """

    def __init__(self, prefix: str) -> None:
        # Views of the map of the index, which megatron-core opens and, with the dataset, closes.
        self.dataset = IndexedDataset(prefix, multimodal=False, mmap=False)
        index = self.dataset.index
        self.lengths, self.offsets = index.sequence_lengths, index.sequence_pointers
        self._dtype = np.dtype(index.dtype)
        self._itemsize = self._dtype.itemsize
        self._path = f"{prefix}.bin"
        self._descriptor = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, idx: int, offset: int, length: int) -> NDArray[np.integer]:
        """`length` tokens of document `idx`, from its token `offset` on.

        Raises:
            InputError: names the file and the byte that cannot be read.
        """
        at, size = self.offsets.item(idx) + offset * self._itemsize, length * self._itemsize
        try:
            data = os.pread(self._descriptor, size, at)  # the whole, but at the end of a file
            while len(data) < size:
                more = os.pread(self._descriptor, size - len(data), at + len(data))
                if not more:
                    raise InputError(
                        f"{self._path} ends before byte {at + len(data)}, which training needs: it "
                        f"was cut short since training began; put it back, and start again to "
                        f"resume from the newest checkpoint"
                    )
                data += more
        except OSError as error:
            raise InputError(
                f"{self._path} cannot be read at byte {at}: {error.strerror}; see to the disk, and "
                f"start again to resume from the newest checkpoint"
            ) from error
        return np.frombuffer(data, self._dtype)


# Each costs 2 descriptors and a memory map; 1,024 and 65,530 are the usual limits of a process.
OPEN_TOKEN_FILES: RecentlyUsed[_OpenTokens] = RecentlyUsed(128)


class TokenFile:
    """What a GPTDataset asks of megatron-core's IndexedDataset, from files opened when needed.

    `sequence_lengths` is a view of the open file: use it before another one is opened.
    """

    def __init__(self, prefix: Path) -> None:
        self.path_prefix = str(prefix)
        # Files that were replaced since are other files.
        self._key = f"{prefix} {Path(f'{prefix}.idx').stat().st_mtime_ns}"

    def _opened(self) -> _OpenTokens:
        return OPEN_TOKEN_FILES.get(self._key, lambda: _OpenTokens(self.path_prefix))

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """Tokens of each document."""
        lengths: NDArray[np.int32] = self._opened().lengths
        return lengths

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.integer]:
        """Tokens of one document, or of a part of it.

        Raises:
            InputError: names the file and the byte that cannot be read.
        """
        opened = self._opened()
        if length is None:
            length = opened.lengths.item(idx) - offset
        return opened.read(idx, offset, length)
