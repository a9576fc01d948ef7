"""What a probe reads: a seeded stream of its own, and the tasks' items that decide."""

from collections.abc import Callable, Sequence

from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.data.tasks import Task, micro_batches


class ProbeData:
    """Micro-batches of one data-parallel rank for the influence probe.

    Sub-batch b of a domain holds the same samples for every layout and micro-batch size; where
    they do not fill the last micro-batches, masked samples do. Training's cursors are not
    touched: the streams have a seed of their own, new at every stage.

    Args:
        open_stream: (domain index, stage) to the probe's stream of the domain's train split.
        domains: names, D.
        tasks: validation tasks, V.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], DomainStream],
        domains: Sequence[str],
        tasks: Sequence[Task],
        *,
        sub_batches: int,
        sub_batch_samples: int,
        task_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        microbatch_multiple: int,
    ) -> None:
        self._open_stream = open_stream
        self.domains = list(domains)
        self.tasks = list(tasks)
        self.sub_batches = sub_batches
        self._sub_batch_samples = sub_batch_samples
        self._task_samples = task_samples
        self._share = {
            "micro_batch_size": micro_batch_size,
            "rank": data_parallel_rank,
            "size": data_parallel_size,
            "multiple": microbatch_multiple,
        }

    def of_task(self, task: int) -> list[Sample]:
        """The items that decide, of validation task number `task`."""
        stream = self.tasks[task].decide
        samples = range(min(self._task_samples, stream.samples_per_epoch))
        return micro_batches(stream, samples, **self._share)

    def of_domain(self, domain: int, stage: int) -> list[list[Sample]]:
        """The B sub-batches of domain number `domain`, for the decision on `stage`."""
        stream = self._open_stream(domain, stage)
        n = self._sub_batch_samples
        return [
            micro_batches(stream, range(b * n, (b + 1) * n), **self._share)
            for b in range(self.sub_batches)
        ]
