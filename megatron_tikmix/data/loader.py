"""Batches of one data-parallel rank, driven by consumed_samples alone."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_tikmix.data.samples import Sample


def micro_batch_indices(
    start: int, samples: int, *, micro_batch_size: int, rank: int, size: int
) -> Iterator[list[int]]:
    """The global sample indices of each micro-batch of data-parallel rank `rank` of `size`.

    As in Megatron's own sampler: consecutive groups of micro_batch_size × size samples, of
    which each rank takes a consecutive part. `samples` from `start` on are covered once.
    """
    for group in range(start, start + samples, micro_batch_size * size):
        first = group + rank * micro_batch_size
        yield list(range(first, first + micro_batch_size))


class DataParallelLoader:
    """Makes one iterator of micro-batches per interval, so nothing old is ever served."""

    def __init__(
        self,
        dataset: Dataset[Sample],
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_workers: int,
    ) -> None:
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._num_workers = num_workers

    def interval(self, consumed_samples: int, samples: int) -> Iterator[Sample]:
        """This rank's micro-batches of the `samples` samples after `consumed_samples`."""
        indices = micro_batch_indices(
            consumed_samples,
            samples,
            micro_batch_size=self._micro_batch_size,
            rank=self._rank,
            size=self._size,
        )
        return iter(
            DataLoader(
                self._dataset,
                batch_sampler=list(indices),
                num_workers=self._num_workers,
                pin_memory=torch.cuda.is_available(),
                # A generator of its own: making an iterator must not draw from training's RNG.
                generator=torch.Generator().manual_seed(consumed_samples),
            )
        )
