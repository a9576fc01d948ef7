"""What a rollout reads: samples blended by a candidate, and the tasks' items that decide."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from megatron_tikmix.data.blended_dataset import BlendedDataset
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.loader import DataParallelLoader
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.mixing import MixtureSchedule


class RolloutData:
    """Micro-batches of one data-parallel rank for short continuations.

    Candidates share their random numbers: for one seed, the k-th sample of a domain is the same
    whatever the weights, and so is the shuffling of the order. Training's cursors are not
    touched.

    Args:
        open_stream: (domain index, seed) to a stream of the domain's train split.
        domains: names, D.
        tasks: names of the validation tasks, V.
        deciding_items: task index to the micro-batches of its items that decide.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], DomainStream],
        domains: Sequence[str],
        tasks: Sequence[str],
        deciding_items: Callable[[int], list[Sample]],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self._open_stream = open_stream
        self.domains = list(domains)
        self.tasks = list(tasks)
        self._deciding_items = deciding_items
        self.global_batch_size = global_batch_size
        self.num_microbatches = global_batch_size // (micro_batch_size * data_parallel_size)
        self._share = {
            "micro_batch_size": micro_batch_size,
            "data_parallel_rank": data_parallel_rank,
            "data_parallel_size": data_parallel_size,
        }

    def of_tasks(self) -> list[list[Sample]]:
        """The micro-batches of each task's items that decide."""
        return [self._deciding_items(task) for task in range(len(self.tasks))]

    def streams(self, seed: int) -> list[DomainStream]:
        """Each domain's samples for `seed`: the same for all candidates."""
        return [self._open_stream(domain, seed) for domain in range(len(self.domains))]

    def blended(
        self, streams: Sequence[DomainStream], weights_D: np.ndarray, *, seed: int, iters: int
    ) -> Iterator[Sample]:
        """This rank's micro-batches of `iters` global batches, blended as training would.

        Args:
            weights_D: integer weights, int64 (D,), sum 2³⁰.
        """
        schedule = MixtureSchedule(self.domains, self.global_batch_size, seed)
        schedule.append(0, dict(zip(self.domains, weights_D.tolist(), strict=True)))
        loader = DataParallelLoader(BlendedDataset(schedule, streams), num_workers=0, **self._share)
        return loader.interval(0, iters * self.global_batch_size)
