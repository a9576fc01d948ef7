"""`.bin/.idx` pairs of which a bounded number is open at a time, over all streams of a process."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

Opened = TypeVar("Opened")


class RecentlyUsed(Generic[Opened]):
    """The `limit` objects that were asked for last; the others are let go, and so closed."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._objects: OrderedDict[Hashable, Opened] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Opened]) -> Opened:
        """The object of this key, made if it is not among them."""
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
    """An IndexedDataset, and its tokens as one array."""

    def __init__(self, prefix: str) -> None:
        # Views of the maps that megatron-core opens and, with the dataset, closes.
        self.dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
        index = self.dataset.index
        self.lengths, self.offsets = index.sequence_lengths, index.sequence_pointers
        self.itemsize = index.dtype_size
        last = len(self.lengths) - 1
        count = int(self.offsets[last]) // self.itemsize + int(self.lengths[last])
        self.tokens = self.dataset.bin_reader.read(index.dtype, count, 0)


# Each costs 3 descriptors and 2 memory maps; 1,024 and 65,530 are the usual limits of a process.
OPEN_TOKEN_FILES: RecentlyUsed[_OpenTokens] = RecentlyUsed(128)


class TokenFile:
    """What a GPTDataset asks of megatron-core's IndexedDataset, from files opened when needed.

    What it hands out are views of the open file: use them before another one is opened.
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
        """Tokens of one document, or of a part of it."""
        opened = self._opened()
        if length is None:
            length = int(opened.lengths[idx]) - offset
        first = int(opened.offsets[idx]) // opened.itemsize + offset
        tokens: NDArray[np.integer] = opened.tokens[first : first + length]
        return tokens
