"""What a boundary decides from what its probe measured. On the main rank only; no collective."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.config import RemixConfig
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.budget import AdaptiveBudget, sensitivity
from megatron_tikmix.influence.matrix import (
    InfluenceMatrix,
    has_own_rows,
    joint_influence,
    smoothed,
)
from megatron_tikmix.influence.stability import RankStability, rank_stability
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.solve.constraints import MixtureConstraints, epoch_caps
from megatron_tikmix.solve.solution import MixtureSolution
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d
from megatron_tikmix.solve.tikmix_m import solve_tikmix_m

Measure = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Candidates (N, D) over the schedule's domains, to the drop of each task's loss (N, V)."""


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where a run stands when its mixture is to be reset.

    Attributes:
        stage: the stage that is to be decided.
        iteration: optimizer steps done.
        prior: the mixture in force.
        consumed: samples of each domain drawn so far.
        interval_samples: samples that the stage will draw from all domains.
        ledger: the rows of all stages so far.
    """

    stage: int
    iteration: int
    prior: Mixture
    consumed: Mapping[str, int]
    interval_samples: int
    ledger: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls,
        schedule: MixtureSchedule,
        ledger: Sequence[Mapping[str, Any]],
        *,
        iteration: int,
        consumed_samples: int,
        interval_samples: int,
    ) -> "Boundary":
        """The boundary that is reached after `consumed_samples` of this schedule."""
        counts_D = schedule.domain_counts(consumed_samples)
        return cls(
            stage=len(schedule.stages),
            iteration=iteration,
            prior=schedule.mixture(-1),
            consumed=dict(zip(schedule.domains, counts_D.tolist(), strict=True)),
            interval_samples=interval_samples,
            ledger=ledger,
        )


@dataclass(frozen=True)
class Decision:
    """What one boundary decided, and why.

    `mixture` is the same on every rank; what it was decided on is None off the main rank.

    Attributes:
        mixture: the next interval's, already rounded to integer weights.
        curvature: what the probe used, as the ledger names it.
        source: "tikmix_d", "tikmix_m", "fallback" (the nearest mixture that is allowed), or "kept".
        reason: one sentence.
        bank: what the probe measured.
        influence: what was solved on: the bank's matrix, smoothed if that is asked for.
        total_variation_noise: total variation that 95% of solutions on redrawn influence
            matrices stay within, from the solution on the measured one.
        rank_stability: against the boundary before.
        rollout: what rollouts cost, if candidates were measured by them.
        audit: what an audit found.
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
    rank_stability: RankStability | None = None
    rollout: dict[str, Any] | None = None
    audit: dict[str, Any] | None = None

    @property
    def forced(self) -> bool:
        """Whether the mixture in force breaks a constraint that always holds. Main rank only."""
        solution = self.solution
        return self.source == "fallback" or (solution is not None and solution.prior_violation > 0)

    def to_json(self) -> dict[str, Any]:
        """Its fields of a ledger row; the mixture itself is in the row already."""
        row = self.influence.to_json() if self.influence else {}
        return row | {
            "source": self.source,
            "reason": self.reason,
            "curvature": self.curvature,
            "total_variation_noise": self.total_variation_noise,
            "probe_tokens": self.probe_tokens,
            "probe_seconds": self.probe_seconds,
            "solution": self.solution.to_json() if self.solution else None,
            "bank": self.bank.to_json() if self.bank else None,
            "rank_stability": self.rank_stability.to_json() if self.rank_stability else None,
            "rollout": self.rollout,
            "audit": self.audit,
        }


class Decider:
    """Solves for the next mixture, and decides whether it is worth more than its noise.

    A domain whose gradient was not finite keeps its weight, and a task whose gradient was not is
    left out; both are named in the reason.

    Args:
        config: policy, weights and constraints.
        seed: of bootstrap draws, candidates and the surrogate.
        task_weights: what each task counts for, by name.
        samples_per_epoch: of each domain; their order is that of the schedule's domains.
    """

    def __init__(
        self,
        config: RemixConfig,
        *,
        seed: int,
        task_weights: Mapping[str, float],
        samples_per_epoch: Mapping[str, int],
    ) -> None:
        self._config = config.settled()
        self._seed = seed
        self._task_weights = dict(task_weights)
        self._samples_per_epoch = dict(samples_per_epoch)

    def check(self, initial: Mixture, interval_samples: int) -> None:
        """Solve once on no influence at all, for what its arguments may have wrong.

        Raises:
            InputError: the configured constraints name an unknown domain, or cannot hold together.
        """
        nothing = InfluenceMatrix(
            np.zeros((len(self._task_weights), len(initial))),
            domains=list(initial),
            tasks=list(self._task_weights),
            standard_error_VD=np.zeros((len(self._task_weights), len(initial))),
        )
        start = Boundary(
            stage=1,
            iteration=0,
            prior=initial,
            consumed=dict.fromkeys(initial, 0),
            interval_samples=interval_samples,
            ledger=[],
        )
        self._solve_d(nothing, start)

    def budget(self, at: Boundary, precision: float) -> AdaptiveBudget:
        """The rule that adds sub-batches until the mixture is settled."""
        return AdaptiveBudget(
            precision,
            lambda influence: self._solve_d(self._smoothed(influence, at), at).mixture,
            defaultdict(float, self._task_weights),  # the domains' own rows weigh nothing
            self._generator("budget", at),
        )

    def decide(self, bank: SubBatchBank, at: Boundary, measure: Measure | None = None) -> Decision:
        """The decision on what the probe measured.

        Args:
            measure: measures candidates for TiKMiX-M; None: by the influence that TiKMiX-D
                solves on.
        """
        lost = _lost(bank)
        usable = bank.usable().of_tasks(list(self._task_weights))
        if not usable.domains or not usable.tasks:
            return Decision(at.prior, source="kept", reason=lost, bank=bank)
        found = Decision(at.prior, bank=bank, rank_stability=self._rank_stability(bank, at))
        influence = self._smoothed(bank.influence_matrix(), at)
        try:
            solution = self._solve(influence, at, measure)
        except InputError as error:  # caps that nothing fits any more, for example
            reason = f"no mixture can be decided: {error}"
            return replace(found, source="kept", reason=reason, influence=influence)
        noise = sensitivity(
            bank,
            lambda drawn: self._solve_d(self._smoothed(drawn, at), at).mixture,
            self._generator("redraw", at),
        ).total_variation
        source, reason = self._verdict(solution, at.prior, noise)
        return replace(
            found,
            mixture=at.prior if source == "kept" else solution.mixture.rounded(),
            source=source,
            reason="; ".join(filter(None, [reason, lost])),
            influence=influence,
            solution=solution,
            total_variation_noise=noise,
        )

    def _verdict(self, solution: MixtureSolution, prior: Mixture, noise: float) -> tuple[str, str]:
        """Where the next mixture comes from, and why."""
        moved = solution.mixture.rounded().total_variation(prior)
        forced = solution.prior_violation > 0
        if moved == 0:
            active = ", ".join(solution.active_constraints[:4]) or "none"
            best = f"no mixture within the constraints is better (those that bind: {active})"
            return "kept", solution.reason or best
        if self._config.mode == "advise":
            return "kept", f"remix.mode is advise; a change of {moved:.3f} was found"
        if solution.status == "fallback":
            return "fallback", solution.reason
        if forced:
            broken = "the mixture in force breaks a constraint"
            return self._config.policy, "; ".join(filter(None, [broken, solution.reason]))
        if moved <= noise:
            return "kept", (
                f"the change of {moved:.3f} is within what noise alone would move the answer, "
                f"{noise:.3f}"
            )
        reason = f"the change of {moved:.3f} is beyond the noise of the answer, {noise:.3f}"
        return self._config.policy, "; ".join(filter(None, [reason, solution.reason]))

    # Solving ----------------------------------------------------------------------------

    def _solve(
        self, influence: InfluenceMatrix, at: Boundary, measure: Measure | None
    ) -> MixtureSolution:
        if self._config.policy != "tikmix_m":
            return self._solve_d(influence, at)
        matrix = completed(influence, list(at.prior))

        def probe(weights_ND: NDArray[np.float64]) -> NDArray[np.float64]:
            """Candidates over the matrix's domains, to outcomes of its tasks."""
            assert measure is not None
            by_name = dict(zip(matrix.domains, weights_ND.T, strict=True))
            outcomes_NV = measure(np.stack([by_name[name] for name in at.prior], axis=1))
            asked = list(self._task_weights)
            return outcomes_NV[:, [asked.index(task) for task in matrix.tasks]]

        try:
            return solve_tikmix_m(
                matrix,
                at.prior,
                probe=None if measure is None else probe,
                candidates=self._config.candidates,
                seed=derived_seed(self._seed, "tikmix_m", at.stage) >> 1,
                **self._arguments(influence, at),
            )
        except RolloutError as error:  # training itself is as it was
            first = self._solve_d(influence, at)
            reason = f"{error}: the answer is TiKMiX-D's"
            return replace(first, reason="; ".join(filter(None, [first.reason, reason])))

    def _solve_d(self, influence: InfluenceMatrix, at: Boundary) -> MixtureSolution:
        return solve_tikmix_d(
            completed(influence, list(at.prior)), at.prior, **self._arguments(influence, at)
        )

    def _arguments(self, influence: InfluenceMatrix, at: Boundary) -> dict[str, Any]:
        config = self._config
        references = {
            "uniform": None,
            "proportional": Mixture.proportional(self._samples_per_epoch),
            "prior": _floored(at.prior),
        }
        weights = {name: self._task_weights[name] for name in influence.tasks}
        return {
            "alpha": config.alpha,
            "beta": config.beta,
            "gamma": config.gamma,
            "task_weights": None if config.preset == "paper" else weights,
            "preset": config.preset,
            "gain": config.gain,
            "constraints": self._constraints(influence, at),
            "diversity_reference": references[config.diversity_reference or "prior"],
        }

    def _constraints(self, influence: InfluenceMatrix, at: Boundary) -> MixtureConstraints:
        """Those configured; with caps for this boundary, and domains of unknown influence fixed."""
        config = self._config.constraints
        caps = {}
        if config.max_epochs is not None:
            caps = epoch_caps(
                self._samples_per_epoch, at.consumed, at.interval_samples, config.max_epochs
            )
        unknown = {name: at.prior[name] for name in at.prior if name not in influence.domains}
        fixed = config.fixed
        if unknown:
            named = (
                fixed if isinstance(fixed, Mapping) else {name: at.prior[name] for name in fixed}
            )
            fixed = {**unknown, **named}
        return replace(config, epoch_caps=caps, fixed=fixed)

    def _smoothed(self, influence: InfluenceMatrix, at: Boundary) -> InfluenceMatrix:
        """What is solved on: joint influence where that is measured, averaged with what former
        boundaries measured, if that is asked for."""
        joint = has_own_rows(influence)
        influence = joint_influence(influence)
        if not self._config.smoothing:
            return influence
        tasks = list(self._task_weights)
        banks = [bank for row in at.ledger if (bank := _bank_of(row)) is not None]
        usable = [(bank, bank.of_tasks(tasks).usable()) for bank in banks]
        measured = [bank for bank, rows in usable if rows.domains and rows.tasks]
        if joint:  # a stage that measured no domain's own rows says nothing of joint influence
            matrices = [bank.influence_matrix() for bank in measured]
            history = [joint_influence(matrix) for matrix in matrices if has_own_rows(matrix)]
        else:
            history = [bank.of_tasks(tasks).influence_matrix() for bank in measured]
        return smoothed([*history, influence], self._config.smoothing)

    def _rank_stability(self, bank: SubBatchBank, at: Boundary) -> RankStability | None:
        banks = [former for row in at.ledger if (former := _bank_of(row)) is not None]
        if not banks:
            return None
        tasks = list(self._task_weights)
        before, after = banks[-1].of_tasks(tasks), bank.of_tasks(tasks)
        return rank_stability(before, after, self._generator("ranks", at))

    def _generator(self, purpose: str, at: Boundary) -> np.random.Generator:
        return np.random.default_rng(derived_seed(self._seed, purpose, at.stage))


def completed(
    influence: InfluenceMatrix, domains: Sequence[str], tasks: Sequence[str] = ()
) -> InfluenceMatrix:
    """The matrix with further domains and tasks, whose influence is not known, at 0."""
    more_domains = [name for name in domains if name not in influence.domains]
    more_tasks = [name for name in tasks if name not in influence.tasks]
    if not more_domains and not more_tasks:
        return influence
    padding = ((0, len(more_tasks)), (0, len(more_domains)))
    errors_VD = influence.standard_error_VD
    return InfluenceMatrix(
        np.pad(influence.values_VD, padding),
        domains=[*influence.domains, *more_domains],
        tasks=[*influence.tasks, *more_tasks],
        standard_error_VD=None if errors_VD is None else np.pad(errors_VD, padding),
        degrees_of_freedom=influence.degrees_of_freedom,
    )


LEAST_REFERENCE = 1e-4
"""Of the uniform weight: what a domain counts for in the diversity term, if it has less or none."""


def _floored(prior: Mixture) -> Mixture:
    """The mixture in force as a reference of diversity.

    Where the reference is 0 the answer is 0: without a floor, a domain that was left out once
    would be left out for ever, however much it has come to help.
    """
    weights_D = np.maximum(prior.array(), LEAST_REFERENCE / len(prior))
    return Mixture(dict(zip(prior, (weights_D / weights_D.sum()).tolist(), strict=True)))


def _bank_of(row: Mapping[str, Any]) -> SubBatchBank | None:
    return SubBatchBank.from_json(row["bank"]) if row.get("bank") else None


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
