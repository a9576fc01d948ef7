"""What a probe reads: a seeded stream of its own, and the tasks' items that decide."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.data.tasks import SampleStream, Task, micro_batches


class ProbeData:
    """Micro-batches of one data-parallel rank for the influence probe.

    Sub-batch b of a domain holds the same samples for every layout and micro-batch size; where
    they do not fill the last micro-batches, masked samples do. Training's cursors are not
    touched: the streams have a seed of their own, new at every stage.

    Args:
        open_stream: (domain index, stage) to the probe's stream of the domain's train split.
        domains: names, D.
        tasks: validation tasks, V.
        sub_batch_samples: samples of one sub-batch.
        task_samples: at most so many samples of each task decide.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], DomainStream],
        domains: Sequence[str],
        tasks: Sequence[Task],
        *,
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
        self._sub_batch_samples = sub_batch_samples
        self._task_samples = task_samples
        self._micro_batch_size = micro_batch_size
        self._multiple = microbatch_multiple
        self._place = data_parallel_rank, data_parallel_size

    def of_task(self, task: int) -> list[Sample]:
        """This rank's share of the items that decide, of validation task number `task`."""
        stream = self.tasks[task].decide
        samples = range(min(self._task_samples, stream.samples_per_epoch))
        return self._micro_batches(stream, samples, *self._place)

    def of_domain(
        self, domain: int, stage: int, sub_batches: Iterable[int], *, whole: bool = False
    ) -> Iterator[list[Sample]]:
        """Sub-batches of domain number `domain`, by their numbers, for the decision on `stage`.

        Args:
            whole: all of each sub-batch, instead of this data-parallel rank's share of it.
        """
        stream = self._open_stream(domain, stage)
        n = self._sub_batch_samples
        for b in sub_batches:
            samples = range(b * n, (b + 1) * n)
            yield self._micro_batches(stream, samples, *((0, 1) if whole else self._place))

    def _micro_batches(
        self, stream: SampleStream, samples: range, rank: int, size: int
    ) -> list[Sample]:
        return micro_batches(
            stream,
            samples,
            micro_batch_size=self._micro_batch_size,
            rank=rank,
            size=size,
            multiple=self._multiple,
        )
