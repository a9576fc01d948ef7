"""Reading `.bin/.idx` pairs with a bounded number of open files in a process, over all streams."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError

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
    """An IndexedDataset that reads tokens from the file instead of mapping it.

    If a mapped file is truncated or its disk fails, reading it kills the process silently by
    SIGBUS; here it raises an error that names the file.
    """

    def __init__(self, prefix: str) -> None:
        # Views of the mapped index, which megatron-core opens, and closes with the dataset.
        self.dataset = IndexedDataset(prefix, multimodal=False, mmap=False)
        index = self.dataset.index
        self.lengths, self.offsets = index.sequence_lengths, index.sequence_pointers
        self._dtype = np.dtype(index.dtype)
        self._itemsize = self._dtype.itemsize
        self._path = f"{prefix}.bin"
        self._descriptor = os.open(self._path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, idx: int, offset: int, length: int) -> NDArray[np.integer]:
        """Return `length` tokens of document `idx`, from its token `offset` on.

        Raises:
            InputError: names the file and the byte that cannot be read.
        """
        at, size = self.offsets.item(idx) + offset * self._itemsize, length * self._itemsize
        try:
            data = os.pread(self._descriptor, size, at)  # short only at the end of the file
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
    """A stand-in for megatron-core's IndexedDataset in a GPTDataset; opens files when needed.

    `sequence_lengths` is a view of the open file: use it before another one is opened.
    """

    def __init__(self, prefix: Path) -> None:
        self.path_prefix = str(prefix)
        # The time distinguishes a replaced file from the one in the cache.
        self._key = f"{prefix} {Path(f'{prefix}.idx').stat().st_mtime_ns}"

    def _opened(self) -> _OpenTokens:
        return OPEN_TOKEN_FILES.get(self._key, lambda: _OpenTokens(self.path_prefix))

    @property
    def sequence_lengths(self) -> NDArray[np.int32]:
        """The number of tokens of each document."""
        lengths: NDArray[np.int32] = self._opened().lengths
        return lengths

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> NDArray[np.integer]:
        """Return the tokens of one document, or of a part of it.

        Raises:
            InputError: names the file and the byte that cannot be read.
        """
        opened = self._opened()
        if length is None:
            length = opened.lengths.item(idx) - offset
        return opened.read(idx, offset, length)
