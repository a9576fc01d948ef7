"""Training batches: global sample index -> (domain, k) -> sample, through the mixture schedule.

The batches of a data-parallel rank depend on `consumed_samples` alone.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.collectives import agree_on_input
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.samples import Sample, stack
from megatron_tikmix.mixture.schedule import MixtureSchedule


class BlendedDataset(Dataset[Sample]):
    """The training samples in the order the schedule gives them.

    The order is a pure function of (schedule, seed, index), so any rank can read any sample
    at any time. Each sample also has ``domain``, the index of its domain, int64 ().

    Args:
        parallel: for streams with large indices on disk, which its main rank writes.
    """

    def __init__(
        self,
        schedule: MixtureSchedule,
        streams: Sequence[DomainStream],
        parallel: Parallel | None = None,
    ) -> None:
        self._schedule = schedule
        self._streams = list(streams)
        self._domains = torch.arange(len(streams)).unbind()
        self._parallel = parallel

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the samples of these global indices, as a DataLoader asks for them."""
        samples = []
        places = self._schedule.locate_many(indices)
        for domain, k in zip(places.domains_N.tolist(), places.k_N.tolist(), strict=True):
            sample = self._streams[domain][k]
            sample["domain"] = self._domains[domain]
            samples.append(sample)
        return samples

    def prepare(self, start: int, samples: int) -> None:
        """Load, before workers start, the indices for `samples` samples from `start` on.

        Collective if the dataset was made with `parallel`.
        """
        first_D = self._schedule.domain_counts(start)
        end_D = self._schedule.domain_counts(start + samples)
        needed = [
            (stream, stream.epochs_of(first, end))
            for stream, first, end in zip(
                self._streams, first_D.tolist(), end_D.tolist(), strict=True
            )
        ]
        if self._parallel is not None:
            problem = self._write_indices(needed) if self._parallel.is_main else None
            agree_on_input(problem, self._parallel)
        for stream, epochs in needed:
            stream.prepare(epochs)

    def _write_indices(self, needed: list[tuple[DomainStream, range]]) -> InputError | None:
        try:
            for stream, epochs in needed:
                stream.write_indices(epochs)
        except InputError as error:
            return error
        return None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_parallel": None}  # workers take part in no collective


class MicroBatchSampler(Sampler[list[int]]):
    """The global sample indices of each micro-batch of one data-parallel rank.

    As in Megatron's own sampler, of each group of micro_batch_size × size consecutive samples
    every rank takes a consecutive part; `samples` from `start` on are covered once. Every global
    batch, also during a batch-size ramp-up, is a whole number of such groups. Indices are computed
    as needed, never listed.
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
    """Makes one iterator of micro-batches per interval, so no samples of an old mixture are served.

    Its workers start and end with the iterator, with a copy of the schedule at that time: none
    runs during a boundary.
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
        """Return this rank's micro-batches of the `samples` samples after `consumed_samples`.

        Collective if :meth:`BlendedDataset.prepare` is.
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
                # Workers use torch's default, which stacks directly into shared memory.
                collate_fn=None if self._num_workers else stack,
                pin_memory=torch.cuda.is_available(),
                # Without its own generator, the iterator would draw from training's RNG.
                generator=torch.Generator().manual_seed(consumed_samples),
                worker_init_fn=_ignore_foreign_sigterm,
            )
        )
        return _with_plain_errors(batches) if self._num_workers else batches


def _ignore_foreign_sigterm(worker: int) -> None:
    """Let SIGTERM end this worker only if its own rank sent it.

    Schedulers send it to every process of a job, but the rank needs its workers to finish its step.
    It ends them itself, after a failure by the same signal.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    rank = multiprocessing.parent_process()
    assert rank is not None  # a worker has a parent

    def listen() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != rank.pid:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def _with_plain_errors(batches: Iterator[Sample]) -> Iterator[Sample]:
    """Yield the workers' batches; raise their InputError without the traceback torch adds."""
    try:
        yield from batches
    except InputError as error:
        raise InputError(str(error).rpartition(f"{InputError.__name__}: ")[2].strip()) from None
