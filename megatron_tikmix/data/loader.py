"""Batches of one data-parallel rank, driven by consumed_samples alone."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from megatron_tikmix.data.blended_dataset import BlendedDataset
from megatron_tikmix.data.samples import Sample, stack
from megatron_tikmix.errors import InputError


class MicroBatchSampler(Sampler[list[int]]):
    """The global sample indices of each micro-batch of one data-parallel rank.

    As in Megatron's own sampler: consecutive groups of micro_batch_size × size samples, of which
    each rank takes a consecutive part; `samples` from `start` on are covered once. Every global
    batch is a whole number of such groups, whatever its size, so a batch-size ramp-up changes
    nothing here. No list of indices is ever made.
    """

    def __init__(
        self, start: int, samples: int, *, micro_batch_size: int, rank: int, size: int
    ) -> None:
        self._micro_batch_size = micro_batch_size
        first = start + rank * micro_batch_size
        self._firsts = range(first, start + samples, micro_batch_size * size)

    def __iter__(self) -> Iterator[list[int]]:
        for first in self._firsts:
            yield list(range(first, first + self._micro_batch_size))

    def __len__(self) -> int:
        return len(self._firsts)


class DataParallelLoader:
    """Makes one iterator of micro-batches per interval, so nothing old is ever served.

    Its workers start with the iterator, know the schedule as it is then, and end with it: none
    is alive while a boundary decides.
    """

    def __init__(
        self,
        dataset: BlendedDataset,
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
        """This rank's micro-batches of the `samples` samples after `consumed_samples`.

        Collective, if preparing the dataset is.
        """
        self._dataset.prepare(consumed_samples, samples)
        batches = iter(
            DataLoader(
                self._dataset,
                batch_sampler=MicroBatchSampler(
                    consumed_samples,
                    samples,
                    micro_batch_size=self._micro_batch_size,
                    rank=self._rank,
                    size=self._size,
                ),
                num_workers=self._num_workers,
                # Workers have torch's own, which stacks right into shared memory.
                collate_fn=None if self._num_workers else stack,
                pin_memory=torch.cuda.is_available(),
                # A generator of its own: making an iterator must not draw from training's RNG.
                generator=torch.Generator().manual_seed(consumed_samples),
                worker_init_fn=_heed_only_the_parent,
            )
        )
        return _told_in_one_sentence(batches) if self._num_workers else batches


def _heed_only_the_parent(worker: int) -> None:
    """SIGTERM ends this worker if its rank sent it, and nothing else does.

    Schedulers send it to every process of a job; the rank then finishes its step, and needs its
    workers for that. It ends them itself, by the same signal where it has failed.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    rank = multiprocessing.parent_process()
    assert rank is not None  # of a worker there is one

    def listen() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank.pid:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _told_in_one_sentence(batches: Iterator[Sample]) -> Iterator[Sample]:
    """Batches of worker processes; of what they cannot read, torch would tell the traceback."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2].strip()) from None
