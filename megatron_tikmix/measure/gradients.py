"""Inner products of gradients on one rank, and the validation gradients that a probe keeps."""

from collections.abc import Iterable, Iterator

import torch

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.collectives import gather_slices
from megatron_tikmix.megatron.groups import Parallel

# Elements of the (V, chunk) block that is converted to float64 at a time, by device: large, for few
# kernel launches, on an accelerator, and small enough for the cache on a CPU.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ELSEWHERE = 1 << 24
# At most this part of the gradient is converted, so that small models need little memory too.
_PARTS, _LEAST = 16, 4096


def inner_products(tasks_VP: torch.Tensor, gradient: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return ⟨task_i, gradient⟩ for every task i, over the parameters this rank holds.

    These are partial: summed over the ranks among which the parameters are divided they give the
    whole inner products.

    Args:
        tasks_VP: preconditioned validation gradients, any float dtype, (V, P).
        gradient: a domain sub-batch's gradient in pieces, flat, P elements in all. They may be
            views of megatron-core's gradient buffer: no copy of size P is made.

    Returns:
        float64 (V,), on the device. Summed in float64, since an influence is a small difference of
        many large terms.
    """
    V, P = tasks_VP.shape
    products_V = torch.zeros(V, dtype=torch.float64, device=tasks_VP.device)
    first = 0
    block = _BLOCK.get(tasks_VP.device.type, _BLOCK_ELSEWHERE)
    for chunk in _chunks(gradient, max(_LEAST, min(block // V, P // _PARTS))):
        last = first + chunk.numel()
        products_V += tasks_VP[:, first:last].double() @ chunk.double()
        first = last
    if first != P:
        raise ValueError(f"a gradient of {first} elements against {P}")
    return products_V


def _chunks(pieces: Iterable[torch.Tensor], size: int) -> Iterator[torch.Tensor]:
    """Yield the pieces' elements in chunks of `size`, the last one shorter."""
    held: list[torch.Tensor] = []
    room = size
    for piece in pieces:
        while piece.numel() >= room:
            yield torch.cat([*held, piece[:room]]) if held else piece[:room]
            piece, held, room = piece[room:], [], size
        if piece.numel():
            held.append(piece)
            room -= piece.numel()
    if held:
        yield torch.cat(held)


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class KeptGradients:
    """Preconditioned validation gradients, with the domain gradient to multiply them by.

    `sharded` keeps this rank's slice of each row, to be multiplied by its slice of a gradient that
    is reduced as in training. `replicated` keeps whole rows, to be multiplied by this rank's own
    unreduced gradient; with `probe.task_group_size`, one group of tasks at a time is gathered.

    Args:
        tasks_VP: this rank's slices, (V, P); not copied.
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
        """Allocate this rank's slices, (V, P)."""
        dtype = _DTYPES[config.gradient_dtype]
        return torch.empty(V, shards.numel, dtype=dtype, device=shards.device)

    @property
    def number_of_groups(self) -> int:
        return 1 if self._all_at_once else -(-len(self._tasks_VP) // self._group_size)

    def groups(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield groups of tasks with their rows (v, P). Collective: exhaust it on every rank."""
        if self._all_at_once:
            yield slice(None), self._tasks_VP
            return
        for first in range(0, len(self._tasks_VP), self._group_size):
            group = slice(first, first + self._group_size)
            yield group, self._gathered(self._tasks_VP[group])

    def pieces(self) -> list[torch.Tensor]:
        """Return the domain gradient in the buffer, as flat pieces of P elements in all."""
        return self._shards.whole_pieces() if self.whole else self._shards.pieces()

    def _gathered(self, rows_VP: torch.Tensor) -> torch.Tensor:
        """Return the whole rows of these slices, gathered by way of the gradient buffer."""
        whole_VP = rows_VP.new_empty(len(rows_VP), self._shards.whole_numel)
        for row_P, whole_P in zip(rows_VP, whole_VP, strict=True):
            for buffer in self._shards.scatter(row_P):
                gather_slices(buffer, self._parallel.groups.dp_cp)
            pieces = self._shards.whole_pieces()
            sizes = [piece.numel() for piece in pieces]
            for place, piece in zip(whole_P.split(sizes), pieces, strict=True):
                place.copy_(piece)
        return whole_VP
