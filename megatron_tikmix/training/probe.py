"""InfluenceProbe: validation gradients kept once, sub-batches of domains measured against them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer
from numpy.typing import NDArray

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.data.probe import ProbeData
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.influence.gradients import inner_products
from megatron_tikmix.influence.sub_batch_bank import SubBatchBank
from megatron_tikmix.parallel.collectives import check_same_on_all_ranks, sum_over_ranks
from megatron_tikmix.training.curvature import fit_curvature
from megatron_tikmix.training.evaluate import evaluation_mode, loss_and_tokens
from megatron_tikmix.training.optimizer_state import OptimizerShards
from megatron_tikmix.training.step import ForwardBackward, summed_gradients, zero_gradients


class InfluenceProbe:
    """Measures a :class:`SubBatchBank` at the parameters as they are, in as many helpings as asked.

    ::

        with probe.open(stage):
            bank = probe.add(np.full(D, 8))
            while not good_enough(bank):
                bank = probe.add(more_D)

    Every rank must do the same calls with the same arguments. While it is open the model is in
    evaluation mode and its gradient buffers are the probe's; afterwards they are empty, and all
    else is as it was.

    The curvature is applied to the validation gradients: once a task, however many sub-batches
    are added.

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
        self._tasks_VP: torch.Tensor | None = None
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
    """Tokens passed through since it was opened, those of padding included, over all ranks."""

    curvature: str = ""
    """What was used, as the ledger names it; set when it is opened."""

    bad_tasks: Sequence[str] = ()
    """Tasks whose gradient is not finite; set when it is opened."""

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
        if self._tasks_VP is not None:
            raise RuntimeError("the probe is open already")
        self._started = time.perf_counter()
        self._stage = stage
        self.tokens = self._passes = 0
        self._asked = len(self.tasks)
        self._next_D = np.zeros(len(self.domains), dtype=np.int64)
        self._bank = None
        with evaluation_mode(self._model):
            try:
                self._tasks_VP = self._validation_gradients()
                yield self
            finally:
                self._tasks_VP = None
                zero_gradients(self._model, self._optimizer)

    def add(self, sub_batches_D: NDArray[np.integer]) -> SubBatchBank:
        """Measure so many further sub-batches of each domain. Collective.

        Args:
            sub_batches_D: how many of each, int (D,), the same on every rank. Each domain goes
                on in its stream where it stopped: no sample is read twice.

        Returns:
            everything measured since the probe was opened, the same on every rank.
        """
        if self._tasks_VP is None:
            raise RuntimeError("add sub-batches inside `with probe.open(stage):`")
        counts_D = np.asarray(sub_batches_D, dtype=np.int64)
        check_same_on_all_ranks(counts_D.tobytes().hex(), "the probe's request", self._parallel)
        D, B, V = len(self.domains), int(counts_D.max(initial=0)), len(self.tasks)
        self._asked += int(counts_D.sum())
        sums_DBV = torch.zeros(D, B, V, dtype=torch.float64)
        tokens_DB = torch.zeros(D, B, dtype=torch.float64)
        for j, count in enumerate(counts_D.tolist()):
            numbers = range(self._next_D[j], self._next_D[j] + count)
            batches_of = self._data.of_domain(j, self._stage, numbers)
            for b, batches in enumerate(batches_of):
                tokens_DB[j, b] = self._pass(batches)
                sums_DBV[j, b] = inner_products(self._tasks_VP, self._shards.pieces())
        self._next_D += counts_D
        zero_gradients(self._model, self._optimizer)
        self._bank = self._banked(sums_DBV, tokens_DB)
        return self._bank

    def _banked(self, sums_DBV: torch.Tensor, tokens_DB: torch.Tensor) -> SubBatchBank:
        # One collective: inner products add over the shards, token counts over the replicas.
        flat = torch.cat([sums_DBV.flatten(), tokens_DB.flatten()])
        sums, tokens = sum_over_ranks(flat, self._parallel).split(
            [sums_DBV.numel(), tokens_DB.numel()]
        )
        new = SubBatchBank(
            sums.view(sums_DBV.shape).numpy(),
            tokens.view(tokens_DB.shape).numpy(),
            self.domains,
            self.tasks,
            self.bad_tasks,
        )
        return new if self._bank is None else self._bank.extended(new)

    def _validation_gradients(self) -> torch.Tensor:
        """H⁻¹∇f of every task, float32 (V, P); a task whose gradient is not finite has zeros."""
        V = len(self.tasks)
        tasks_VP = torch.empty(V, self._shards.numel, device=self._shards.device)
        tokens_V = torch.zeros(V)
        for i in range(V):
            tokens_V[i] = self._pass(self._data.of_task(i))
            torch.cat(self._shards.pieces(), out=tasks_VP[i])
        tokens_V = sum_over_ranks(tokens_V, self._parallel).clamp(min=1)
        # Fitted when no activations are there, so that its memory comes on top of nothing.
        curvature = fit_curvature(self._config, self._shards, self._parallel, self._fresh_gradients)
        self.curvature = curvature.name
        for i in range(V):
            tasks_VP[i] = curvature.precondition(tasks_VP[i] / tokens_V[i].item())
        bad_V = sum_over_ranks(~torch.isfinite(tasks_VP).all(dim=1), self._parallel) > 0
        tasks_VP[bad_V.to(tasks_VP.device)] = 0.0
        self.bad_tasks = [name for name, bad in zip(self.tasks, bad_V, strict=True) if bad]
        return tasks_VP

    def _fresh_gradients(self) -> Iterator[torch.Tensor]:
        """The mean gradient of one sub-batch of each domain, which is then not measured, (P,)."""
        self._asked += len(self.domains)
        for j in range(len(self.domains)):
            (batches,) = self._data.of_domain(j, self._stage, [int(self._next_D[j])])
            self._next_D[j] += 1
            tokens = sum_over_ranks(torch.tensor(self._pass(batches)), self._parallel).item()
            yield self._shards.gradient() / max(tokens, 1.0)

    def _pass(self, batches: list[Sample]) -> float:
        """Leave this rank's shard of the summed gradient in the buffer; its unmasked tokens."""
        zero_gradients(self._model, self._optimizer)
        with summed_gradients(self._model, reduced=True):
            sums = self._forward_backward(batches, len(batches))
        self._passes += 1
        # What costs is every position, masked or not, on every data-parallel rank.
        positions = sum(batch["tokens"].numel() for batch in batches)
        self.tokens += positions * self._parallel.data_parallel_size
        self._on_progress(self._passes, self._asked)
        return loss_and_tokens(sums, self._parallel)[1].item()
