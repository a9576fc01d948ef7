"""InfluenceProbe: validation gradients kept once, and sub-batches of domains measured against them.

It reads a seeded stream of its own, and the items of tasks that decide (:class:`ProbeData`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from numpy.typing import NDArray

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.tasks import SampleStream, Task, micro_batches
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.measure.curvature import Fit, fit_curvature
from megatron_tikmix.measure.gradients import KeptGradients, inner_products
from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.collectives import check_same_on_all_ranks, sum_over_ranks
from megatron_tikmix.megatron.samples import Sample
from megatron_tikmix.megatron.step import (
    ForwardBackward,
    loss_and_tokens,
    summed_gradients,
    without_chance,
    zero_gradients,
)


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


class InfluenceProbe:
    """Measures a :class:`SubBatchBank` at the present parameters, in one or several calls of `add`.

    ::

        with probe.open(stage):
            bank = probe.add(np.full(D, 8))
            while not good_enough(bank):
                bank = probe.add(more_D)

    Every rank must do the same calls with the same arguments. While it is open the model computes
    as in training, without dropout, and its gradient buffers are the probe's; afterwards they are
    empty, and all else is as it was.

    The curvature is applied to the validation gradients, whichever side has fewer: that is once a
    task however many sub-batches are added, it needs no memory once it is done, and V would have
    to exceed 8 D for the other side to be fewer.

    Args:
        forward_backward: model chunks, process groups and `forward_step_func`, bound to
            megatron-core's schedule.
        optimizer: megatron-core's distributed optimizer.
        data: the probe's samples.
        on_progress: called with (done, asked for so far) passes.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        optimizer: MegatronOptimizer,
        shards: OptimizerShards,
        data: ProbeData,
        config: ProbeConfig,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._forward_backward = forward_backward
        self._model = forward_backward.model
        self._parallel = forward_backward.parallel
        self._optimizer = optimizer
        self._shards = shards
        self._data = data
        self._config = config
        self._on_progress = on_progress
        self._kept: KeptGradients | None = None
        self._bank: SubBatchBank | None = None

    @property
    def domains(self) -> list[str]:
        """Names, D."""
        return self._data.domains

    @property
    def tasks(self) -> list[str]:
        """Names, V."""
        return [task.name for task in self._data.tasks]

    tokens: int = 0
    """Tokens processed since the probe was opened, over all ranks, masked or not."""

    curvature: str = ""
    """Name of the curvature that was used, as in the ledger; set when the probe is opened."""

    bad_tasks: Sequence[str] = ()
    """Tasks whose gradient is not finite; set when the probe is opened."""

    @property
    def seconds(self) -> float:
        """Since it was opened; this rank's clock."""
        return time.perf_counter() - self._started

    @contextmanager
    def open(self, stage: int) -> Iterator["InfluenceProbe"]:
        """Measure and keep the preconditioned validation gradients. Collective.

        Call it after an optimizer step and before gradients are accumulated again.

        Args:
            stage: the stage that is to be decided on: each reads its own samples.
        """
        if self._kept is not None:
            raise RuntimeError("the probe is open already")
        self._started = time.perf_counter()
        self._stage = stage
        self.tokens = self._passes = self._positions = 0
        self._asked = len(self.tasks)
        self._next_D = np.zeros(len(self.domains), dtype=np.int64)
        self._bank = None
        with without_chance(self._model):
            try:
                self._kept = self._validation_gradients()
                yield self
            finally:
                self._kept = None
                zero_gradients(self._model, self._optimizer)

    def add(self, sub_batches_D: NDArray[np.integer]) -> SubBatchBank:
        """Measure so many further sub-batches of each domain. Collective.

        Args:
            sub_batches_D: how many of each, int (D,), the same on every rank. Each domain goes
                on in its stream where it stopped: no sample is read twice before its epoch ends.

        Returns:
            everything measured since the probe was opened, the same on every rank.
        """
        kept = self._kept
        if kept is None:
            raise RuntimeError("add sub-batches inside `with probe.open(stage):`")
        counts_D = np.asarray(sub_batches_D, dtype=np.int64)
        check_same_on_all_ranks(counts_D.tobytes().hex(), "the probe's request", self._parallel)
        D, B, V = len(self.domains), int(counts_D.max(initial=0)), len(self.tasks)
        # On the device, so that the host need not wait for any sub-batch.
        sums_DBV = torch.zeros(D, B, V, dtype=torch.float64, device=self._parallel.device)
        tokens_DB = torch.zeros(D, B, dtype=torch.float64, device=self._parallel.device)
        mine = self._share(counts_D, dealt=kept.whole)
        self._asked += kept.number_of_groups * sum(map(len, mine))
        for group, rows_VP in kept.groups():
            for j, numbers in enumerate(mine):
                first = int(self._next_D[j])
                batches_of = self._data.of_domain(
                    j, self._stage, [first + b for b in numbers], whole=kept.whole
                )
                for b, batches in zip(numbers, batches_of, strict=True):
                    tokens_DB[j, b] = self._pass(batches, reduced=not kept.whole)
                    sums_DBV[j, b, group] = inner_products(rows_VP, kept.pieces())
            del rows_VP  # before the next group is gathered
        self._next_D += counts_D
        zero_gradients(self._model, self._optimizer)
        self._bank = self._banked(sums_DBV, tokens_DB)
        return self._bank

    def _share(self, counts_D: NDArray[np.int64], *, dealt: bool) -> list[list[int]]:
        """The sub-batches of each domain that this rank passes, of `counts_D`: all, or its deal."""
        rank, size = self._parallel.data_parallel_rank, self._parallel.data_parallel_size
        share: list[list[int]] = []
        dealt_out = int(self._next_D.sum())  # goes on where it stopped, so that no rank gets more
        for count in counts_D.tolist():
            share.append([b for b in range(count) if not dealt or (dealt_out + b) % size == rank])
            dealt_out += count
        return share

    def _banked(self, sums_DBV: torch.Tensor, tokens_DB: torch.Tensor) -> SubBatchBank:
        # One collective: inner products add over shards or deals, token counts over replicas.
        sums, tokens = self._summed(sums_DBV, tokens_DB)
        new = SubBatchBank(sums.numpy(), tokens.numpy(), self.domains, self.tasks, self.bad_tasks)
        return new if self._bank is None else self._bank.extended(new)

    def _summed(self, *values: torch.Tensor) -> list[torch.Tensor]:
        """The sum over ranks of each of `values`, which are on the device: float64, on the host.

        Counts the tokens passed meanwhile.
        """
        passed = torch.full((1,), self._positions, dtype=torch.float64, device=values[0].device)
        flat = torch.cat([passed, *(value.flatten().double() for value in values)])
        total, *sums = sum_over_ranks(flat, self._parallel).split(
            [1, *(value.numel() for value in values)]
        )
        self.tokens += int(total.item())
        self._positions = 0
        return [s.view(v.shape) for s, v in zip(sums, values, strict=True)]

    def _validation_gradients(self) -> KeptGradients:
        """H⁻¹∇f of every task; of a task whose gradient is not finite, zeros."""
        V = len(self.tasks)
        tasks_VP = KeptGradients.empty(self._config, self._shards, V)
        tokens_V = torch.zeros(V, dtype=torch.float64, device=self._parallel.device)
        for i in range(V):
            tokens_V[i] = self._pass(self._data.of_task(i), reduced=True)
            tasks_VP[i] = self._shards.gradient()
        (tokens_V,) = self._summed(tokens_V)
        # Fitted when no activations are there, so that its memory comes on top of nothing.
        curvature = fit_curvature(
            Fit(self._config, self._shards, self._parallel, self._fresh_gradients)
        )
        self.curvature = curvature.name
        for i, tokens in enumerate(tokens_V.tolist()):
            tasks_VP[i] = curvature.precondition(tasks_VP[i].float() / max(tokens, 1.0))
        del curvature
        finite_V = torch.stack([torch.isfinite(row_P).all() for row_P in tasks_VP])
        bad_V = sum_over_ranks((~finite_V).int(), self._parallel)
        for i in bad_V.nonzero().flatten().tolist():
            tasks_VP[i] = 0.0
        self.bad_tasks = [name for name, bad in zip(self.tasks, bad_V.tolist(), strict=True) if bad]
        return KeptGradients(self._config, self._shards, self._parallel, tasks_VP)

    def _fresh_gradients(self) -> Iterator[torch.Tensor]:
        """The mean gradient of one sub-batch of each domain, which is then not measured, (P,)."""
        self._asked += len(self.domains)
        for j in range(len(self.domains)):
            (batches,) = self._data.of_domain(j, self._stage, [int(self._next_D[j])])
            self._next_D[j] += 1
            (tokens,) = self._summed(self._pass(batches, reduced=True))
            yield self._shards.gradient().div_(max(tokens.item(), 1.0))

    def _pass(self, batches: list[Sample], *, reduced: bool) -> torch.Tensor:
        """Leave the summed gradient in the buffer; the unmasked tokens of this rank's batches,
        on the device."""
        zero_gradients(self._model, self._optimizer)
        with summed_gradients(self._model, reduced=reduced):
            sums = self._forward_backward(batches, len(batches))
        self._passes += 1
        if self._parallel.reports_loss:
            # What costs is every position, masked or not.
            self._positions += sum(batch["tokens"].numel() for batch in batches)
        self._on_progress(self._passes, self._asked)
        return loss_and_tokens(sums, self._parallel)[1]
