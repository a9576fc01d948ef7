"""Bytes of tensors that come to life while something runs."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make inside it, as long as they live.

    Attributes:
        peak: the most bytes that lived at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held = 0  # with some that have died since
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {s._cdata for s in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            # One that was given and not made here was there before.
            if storage._cdata not in self._made and storage._cdata not in given:
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._held += storage.nbytes()
        if self._held > self.peak:
            self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """Bytes that live at this moment."""
        self._made = {k: entry for k, entry in self._made.items() if not entry[0].expired()}
        self._held = sum(size for _, size in self._made.values())
        return self._held


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [
        leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)
    ]
