"""The validation gradients that a probe keeps, whole or in slices over data-parallel ranks."""

from collections.abc import Iterator

import torch

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.parallel.collectives import gather_slices
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.training.optimizer_state import OptimizerShards

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KeptGradients:
    """Rows of preconditioned validation gradients, and the domain gradient they line up with.

    `sharded` keeps this rank's slice of each row, against its slice of a gradient that was
    reduced as in training. `replicated` keeps whole rows, against this rank's own unreduced
    gradient; in groups of tasks if so configured, each gathered when it is its turn.

    Args:
        tasks_VP: this rank's slices, (V, P); taken over.
    """

    def __init__(
        self,
        config: ProbeConfig,
        shards: OptimizerShards,
        parallel: Parallel,
        tasks_VP: torch.Tensor,
    ) -> None:
        self.whole = config.data_parallel_mode == "replicated"
        self._shards = shards
        self._parallel = parallel
        self._tasks_VP = tasks_VP
        self._all_at_once = config.task_group_size is None or not self.whole
        self._group_size = config.task_group_size or max(len(tasks_VP), 1)
        if self.whole and self._all_at_once:
            self._tasks_VP = self._gathered(tasks_VP)

    @staticmethod
    def empty(config: ProbeConfig, shards: OptimizerShards, V: int) -> torch.Tensor:
        """Room for this rank's slices, (V, P)."""
        dtype = _DTYPES[config.gradient_dtype]
        return torch.empty(V, shards.numel, dtype=dtype, device=shards.device)

    @property
    def number_of_groups(self) -> int:
        return 1 if self._all_at_once else -(-len(self._tasks_VP) // self._group_size)

    def groups(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which tasks, and their rows (v, P). Collective between them: exhaust it on every rank."""
        if self._all_at_once:
            yield slice(None), self._tasks_VP
            return
        for first in range(0, len(self._tasks_VP), self._group_size):
            group = slice(first, first + self._group_size)
            yield group, self._gathered(self._tasks_VP[group])

    def pieces(self) -> list[torch.Tensor]:
        """The domain gradient in the buffer, flat, P elements in all."""
        return self._shards.whole_pieces() if self.whole else self._shards.pieces()

    def _gathered(self, rows_VP: torch.Tensor) -> torch.Tensor:
        """The same rows whole. The gradient buffer is where they are gathered."""
        whole_VP = rows_VP.new_empty(len(rows_VP), self._shards.whole_numel)
        for row_P, whole_P in zip(rows_VP, whole_VP, strict=True):
            for buffer in self._shards.scatter(row_P):
                gather_slices(buffer, self._parallel.groups.dp_cp)
            pieces = self._shards.whole_pieces()
            sizes = [piece.numel() for piece in pieces]
            for place, piece in zip(whole_P.split(sizes), pieces, strict=True):
                place.copy_(piece)
        return whole_VP
