"""Remixer: probe, influence matrix, TiKMiX-D, broadcast."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_tikmix.config import RemixConfig
from megatron_tikmix.influence.sub_batch_bank import SubBatchBank
from megatron_tikmix.mixing import (
    InfluenceMatrix,
    Mixture,
    MixtureConstraints,
    MixtureSolution,
    solve_tikmix_d,
)
from megatron_tikmix.parallel.collectives import broadcast_integers
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.probe import InfluenceProbe

# Bootstrap draws of the matrix behind total_variation_noise, and the quantile taken of them.
_REDRAWS = 40
_QUANTILE = 0.95


@dataclass(frozen=True)
class Decision:
    """What one boundary decided, and why.

    `mixture` is the same on every rank; what was decided on is None off the main rank.

    Attributes:
        mixture: the next interval's, already rounded to integer weights.
        curvature: what the probe used, as the ledger names it.
        source: "tikmix_d", or "kept".
        reason: one sentence.
        bank: what the probe measured.
        total_variation_noise: total variation that 95% of solutions on redrawn influence
            matrices stay within, from the solution on the measured one.
    """

    mixture: Mixture
    probe_tokens: int = 0
    probe_seconds: float = 0.0
    curvature: str | None = None
    source: str | None = None
    reason: str | None = None
    bank: SubBatchBank | None = None
    influence: InfluenceMatrix | None = None
    solution: MixtureSolution | None = None
    total_variation_noise: float | None = None


class Remixer:
    """Decides the next interval's mixture.

    Args:
        probe: measures influence; see there for what it needs of a Megatron loop.
        sub_batches: of each domain.
        seed: of the bootstrap draws that tell how far noise alone would move the answer.
        task_weights: what each task counts for, by name.
    """

    def __init__(
        self,
        probe: InfluenceProbe,
        parallel: Parallel,
        *,
        remix: RemixConfig,
        sub_batches: int,
        seed: int,
        task_weights: Mapping[str, float],
    ) -> None:
        self.probe = probe
        self._parallel = parallel
        self._remix = remix
        self._sub_batches = sub_batches
        self._seed = seed
        self._task_weights = dict(task_weights)

    def remix(self, stage: int, prior: Mixture) -> Decision:
        """Decide the mixture of `stage`, `prior` being the one in force. Collective.

        Call it after an optimizer step and before gradients are accumulated again. It leaves
        gradient buffers empty, and everything else as it found it.
        """
        with self.probe.open(stage) as probe:
            bank = probe.add(np.full(len(probe.domains), self._sub_batches))
            cost: dict[str, Any] = {
                "probe_tokens": probe.tokens,
                "probe_seconds": probe.seconds,
                "curvature": probe.curvature,
            }
        decision = Decision(prior)
        if self._parallel.is_main:
            decision = self._decide(bank, stage, prior)
        # Decided once: rounding or a library's version must never make two ranks disagree.
        names = list(prior)
        mine = np.array([decision.mixture.integer_weights()[name] for name in names])
        weights = broadcast_integers(mine, self._parallel)
        if not self._parallel.is_main:
            decided = dict(zip(names, weights.tolist(), strict=True))
            decision = Decision(Mixture.from_integer_weights(decided))
        return replace(decision, **cost)

    # The decision, on the main rank only ------------------------------------------------

    def _decide(self, bank: SubBatchBank, stage: int, prior: Mixture) -> Decision:
        lost = _lost(bank)
        if not bank.usable().domains or not bank.usable().tasks:
            return Decision(prior, source="kept", reason=lost, bank=bank)
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
            source="kept" if kept else "tikmix_d",
            reason="; ".join(filter(None, [reason, lost])),
            bank=bank,
            influence=influence,
            solution=solution,
            total_variation_noise=noise,
        )

    def _solve(self, influence: InfluenceMatrix, prior: Mixture) -> MixtureSolution:
        """TiKMiX-D; domains that `influence` does not have keep their weight."""
        remix = self._remix
        fixed = {name: prior[name] for name in prior if name not in influence.domains}
        weights = {name: self._task_weights[name] for name in influence.tasks}
        return solve_tikmix_d(
            _with_zeros(influence, list(fixed)),
            prior,
            alpha=remix.alpha,
            beta=remix.beta,
            gamma=remix.gamma,
            task_weights=None if remix.preset == "paper" else weights,
            preset=remix.preset,
            constraints=MixtureConstraints(
                lower=fixed, upper=fixed, max_total_variation=remix.max_total_variation
            ),
        )

    def _noise(
        self, bank: SubBatchBank, stage: int, prior: Mixture, solution: MixtureSolution
    ) -> float:
        generator = np.random.default_rng(derived_seed(self._seed, "redraw", stage))
        distances = [
            self._solve(bank.redrawn(generator), prior).mixture.total_variation(solution.mixture)
            for _ in range(_REDRAWS)
        ]
        return float(np.quantile(distances, _QUANTILE))


def _with_zeros(influence: InfluenceMatrix, names: list[str]) -> InfluenceMatrix:
    """The matrix with further domains of unknown influence: at a fixed weight, 0 will do."""
    zeros_VD = np.zeros((len(influence.tasks), len(names)))
    return InfluenceMatrix(
        np.concatenate([influence.values_VD, zeros_VD], axis=1),
        domains=[*influence.domains, *names],
        tasks=influence.tasks,
    )


def _lost(bank: SubBatchBank) -> str:
    """Which gradients were not finite and what follows, in words; empty if all were."""
    parts = []
    if bank.bad_domains:
        parts.append(
            f"the gradient of {', '.join(bank.bad_domains)} is not finite: the weight stays"
        )
    if bank.bad_tasks:
        parts.append(f"the gradient of task {', '.join(bank.bad_tasks)} is not finite: left out")
    return "; ".join(parts)
