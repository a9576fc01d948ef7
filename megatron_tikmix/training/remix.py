"""Remixer: probe, influence matrix, TiKMiX-D, broadcast."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_tikmix.config import ProbeConfig, RemixConfig
from megatron_tikmix.data.probe import ProbeData
from megatron_tikmix.influence.curvature import Curvature, DampedAdam, Identity
from megatron_tikmix.influence.gradients import inner_products
from megatron_tikmix.influence.sub_batch_bank import SubBatchBank
from megatron_tikmix.mixing import (
    InfluenceMatrix,
    Mixture,
    MixtureConstraints,
    MixtureSolution,
    solve_tikmix_d,
)
from megatron_tikmix.parallel.collectives import broadcast_integers, sum_over_ranks
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.evaluate import evaluation_mode, loss_and_tokens
from megatron_tikmix.training.optimizer_state import OptimizerShards
from megatron_tikmix.training.step import ForwardBackward, zero_gradients

# Bootstrap draws of the matrix behind total_variation_noise, and the quantile taken of them.
_REDRAWS = 40
_QUANTILE = 0.95


@dataclass(frozen=True)
class Decision:
    """What one boundary decided, and why.

    `mixture` is the same on every rank; the rest is None off the main rank.

    Attributes:
        mixture: the next interval's, already rounded to integer weights.
        source: "tikmix_d", or "kept".
        reason: one sentence.
        total_variation_noise: total variation that 95% of solutions on redrawn influence
            matrices stay within, from the solution on the measured one.
    """

    mixture: Mixture
    probe_tokens: int
    probe_seconds: float
    source: str | None = None
    reason: str | None = None
    influence: InfluenceMatrix | None = None
    solution: MixtureSolution | None = None
    total_variation_noise: float | None = None


class Remixer:
    """Decides the next interval's mixture, from what any Megatron loop has in hand.

    Args:
        forward_backward: model chunks, process groups and `forward_step_func`, bound to
            megatron-core's schedule.
        optimizer: megatron-core's distributed optimizer.
        data: the probe's samples.
        task_weights: what each task counts for, by name.
        on_progress: called with (done, all) passes while the probe runs.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        optimizer: MegatronOptimizer,
        shards: OptimizerShards,
        data: ProbeData,
        *,
        remix: RemixConfig,
        probe: ProbeConfig,
        task_weights: Mapping[str, float],
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._forward_backward = forward_backward
        self._model = forward_backward.model
        self._parallel = forward_backward.parallel
        self._optimizer = optimizer
        self._shards = shards
        self._data = data
        self._remix = remix
        self._probe = probe
        self._task_weights = dict(task_weights)
        self._on_progress = on_progress

    def remix(self, stage: int, prior: Mixture) -> Decision:
        """Decide the mixture of `stage`, `prior` being the one in force. Collective.

        Call it after an optimizer step and before gradients are accumulated again. It leaves
        gradient buffers empty, and everything else as it found it.
        """
        started = time.perf_counter()
        bank, tokens = self.probe(stage)
        seconds = time.perf_counter() - started
        decision = Decision(prior, tokens, seconds)
        if self._parallel.is_main:
            decision = self._decide(bank, stage, prior, tokens, seconds)
        # Decided once: rounding or a library's version must never make two ranks disagree.
        names = list(prior)
        mine = np.array([decision.mixture.integer_weights()[name] for name in names])
        weights = broadcast_integers(mine, self._parallel)
        if self._parallel.is_main:
            return decision
        decided = dict(zip(names, weights.tolist(), strict=True))
        return Decision(Mixture.from_integer_weights(decided), tokens, seconds)

    # The probe --------------------------------------------------------------------------

    def probe(self, stage: int) -> tuple[SubBatchBank, int]:
        """Measure every domain's sub-batches against every task. Collective.

        Returns:
            the bank, the same on every rank, and the tokens that were passed through, those of
            padding included: they cost as much.
        """
        D, B, V = len(self._data.domains), self._data.sub_batches, len(self._data.tasks)
        passes = V + D * B
        processed = 0
        sums_DBV = torch.zeros(D, B, V, dtype=torch.float64)
        tokens_DB = torch.zeros(D, B, dtype=torch.float64)
        with evaluation_mode(self._model):
            curvature = self._curvature()
            tasks_VP = torch.empty(V, self._shards.numel, device=self._shards.device)
            for i in range(V):
                batches = self._data.of_task(i)
                gradient_P, _ = self._mean_gradient(batches)
                processed += _tokens(batches)
                tasks_VP[i] = curvature.inverse_product(gradient_P)
                self._on_progress(i + 1, passes)
            for j in range(D):
                for b, batches in enumerate(self._data.of_domain(j, stage)):
                    gradient_P, tokens_DB[j, b] = self._mean_gradient(batches)
                    processed += _tokens(batches)
                    sums_DBV[j, b] = inner_products(tasks_VP, gradient_P)
                    self._on_progress(V + j * B + b + 1, passes)
        zero_gradients(self._model, self._optimizer)
        # One collective: inner products add over the shards, token counts over the replicas.
        flat = torch.cat([sums_DBV.flatten(), tokens_DB.flatten()])
        sums, tokens = sum_over_ranks(flat, self._parallel).split([D * B * V, D * B])
        tokens_DB = tokens.view(D, B)
        bank = SubBatchBank(
            # The schedule gave means; the bank keeps sums.
            (sums.view(D, B, V) * tokens_DB[:, :, None]).numpy(),
            tokens_DB.numpy(),
            self._data.domains,
            [task.name for task in self._data.tasks],
        )
        return bank, processed * self._parallel.data_parallel_size

    def _mean_gradient(self, batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
        """This rank's shard of the mean gradient per token, (P,), and its own tokens."""
        zero_gradients(self._model, self._optimizer)
        sums = self._forward_backward(batches, len(batches))
        return self._shards.gradient(), loss_and_tokens(sums, self._parallel)[1].item()

    def _curvature(self) -> Curvature:
        if self._probe.curvature == "identity":
            return Identity()
        second_moment_P = self._shards.second_moment()
        total, count = sum_over_ranks(
            self._shards.root_sum_and_count(second_moment_P), self._parallel
        ).tolist()
        return DampedAdam(second_moment_P, mean_root=total / count, damping=self._probe.damping)

    # The decision, on the main rank only ------------------------------------------------

    def _decide(
        self, bank: SubBatchBank, stage: int, prior: Mixture, tokens: int, seconds: float
    ) -> Decision:
        bad = [
            name
            for name, sums_BV in zip(bank.domains, bank.sums_DBV, strict=True)
            if not np.isfinite(sums_BV).all()
        ]
        if bad:
            reason = f"the gradient of {', '.join(bad)} is not finite"
            return Decision(prior, tokens, seconds, source="kept", reason=reason)
        influence = bank.influence_matrix()
        solution = self._solve(influence, prior)
        noise = self._noise(bank, stage, prior, solution)
        mixture = solution.mixture.rounded()
        moved = mixture.total_variation(prior)
        kept = True
        if solution.status == "fallback":
            reason = solution.reason
        elif moved <= noise:
            reason = (
                f"the change of {moved:.3f} is within what noise alone would move the answer, "
                f"{noise:.3f}"
            )
        elif not self._remix.apply:
            reason = f"remix.apply is false; a change of {moved:.3f} was found"
        else:
            kept = False
            reason = f"the change of {moved:.3f} is beyond the noise of the answer, {noise:.3f}"
        return Decision(
            prior if kept else mixture,
            tokens,
            seconds,
            source="kept" if kept else "tikmix_d",
            reason=reason,
            influence=influence,
            solution=solution,
            total_variation_noise=noise,
        )

    def _solve(self, influence: InfluenceMatrix, prior: Mixture) -> MixtureSolution:
        remix = self._remix
        return solve_tikmix_d(
            influence,
            prior,
            alpha=remix.alpha,
            beta=remix.beta,
            gamma=remix.gamma,
            task_weights=None if remix.preset == "paper" else self._task_weights,
            preset=remix.preset,
            constraints=MixtureConstraints(max_total_variation=remix.max_total_variation),
        )

    def _noise(
        self, bank: SubBatchBank, stage: int, prior: Mixture, solution: MixtureSolution
    ) -> float:
        generator = np.random.default_rng(derived_seed(self._probe.seed, "redraw", stage))
        distances = [
            self._solve(bank.redrawn(generator), prior).mixture.total_variation(solution.mixture)
            for _ in range(_REDRAWS)
        ]
        return float(np.quantile(distances, _QUANTILE))


def _tokens(batches: list[dict[str, torch.Tensor]]) -> int:
    return sum(batch["tokens"].numel() for batch in batches)
