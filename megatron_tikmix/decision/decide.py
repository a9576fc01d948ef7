"""What a boundary decides from what its probe measured: pure functions of arrays and names.

:class:`Decider` decides at the boundaries of a run; :func:`decide_again` decides a stage of any
run again, from its ledger, as it was or with another goal and other constraints.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.decision.audit import Audit, RolloutCost
from megatron_tikmix.decision.ledger import Measured, StageRow
from megatron_tikmix.decision.rules import Rules
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.budget import AdaptiveBudget, sensitivity
from megatron_tikmix.influence.matrix import (
    FormerInfluence,
    InfluenceMatrix,
    completed,
    has_own_rows,
    joint_influence,
    most_remembered,
)
from megatron_tikmix.influence.stability import RankStability, rank_stability
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.solve.constraints import MixtureConstraints, epoch_caps
from megatron_tikmix.solve.objective import Gain, Goal, Preset, floored
from megatron_tikmix.solve.solution import MixtureSolution
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d
from megatron_tikmix.solve.tikmix_m import MeasuredCandidates, solve_tikmix_m

_log = logging.getLogger(__name__)

Measure = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Candidates (N, D) over the schedule's domains, to the drop of each task's loss (N, V)."""

Array = NDArray[np.float64]


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
    ledger: Sequence[StageRow]

    @classmethod
    def of(
        cls,
        schedule: MixtureSchedule,
        ledger: Sequence[StageRow],
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
        measured: the probe's inner products, and TiKMiX-M's candidates with their outcomes.
        rules: what was decided by.
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
    measured: Measured | None = None
    rules: Rules | None = None
    influence: InfluenceMatrix | None = None
    solution: MixtureSolution | None = None
    total_variation_noise: float | None = None
    rank_stability: RankStability | None = None
    rollout: RolloutCost | None = None
    audit: Audit | None = None

    @property
    def forced(self) -> bool:
        """Whether the mixture in force breaks a constraint that always holds. Main rank only."""
        solution = self.solution
        return self.source == "fallback" or (solution is not None and solution.prior_violation > 0)

    def after(
        self, found: Audit | None, prior: Mixture, required: bool, failure: str = ""
    ) -> "Decision":
        """Return the decision after an audit of it.

        Args:
            found: what the audit found; None: there was none.
            prior: the mixture in force.
            required: whether the mixture in force stays where the audit objects.
            failure: why the audit failed, which is an objection too; empty if it did not.
        """
        objection = failure or (found.reason if found is not None and found.refutes else "")
        decision = self if found is None else replace(self, audit=found)
        if objection and required and not self.forced:
            reason = f"{self.reason}; kept all the same: {objection}"
            return replace(decision, mixture=prior, source="kept", reason=reason)
        if objection and required:
            failure = f"followed all the same, as the mixture in force is not allowed: {objection}"
        return replace(decision, reason=f"{self.reason}; {failure}") if failure else decision

    def row(
        self,
        at: Boundary,
        *,
        task_loss: Mapping[str, float] | None = None,
        domain_epochs: Mapping[str, float] | None = None,
    ) -> StageRow:
        """Return the row of the stage that begins with this decision.

        Args:
            at: the boundary that was decided.
            task_loss: loss of each task there, if the loop evaluates them.
            domain_epochs: passes over each domain so far, if they are known.
        """
        return StageRow(
            stage=at.stage,
            start_iteration=at.iteration,
            start_sample=sum(at.consumed.values()),
            weights=self.mixture.to_json(),
            task_loss=task_loss or {},
            domain_samples=dict(at.consumed),
            domain_epochs=domain_epochs or {},
            total_variation=self.mixture.total_variation(at.prior),
            **self.fields_of_row(),
        )

    def fields_of_row(self) -> dict[str, Any]:
        """Return what a :class:`StageRow` keeps of it, besides the mixture."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name != "mixture"
        }


class RemixSettings(Protocol):
    """What a :class:`Decider` reads of a run's settings of the same names (section `remix`)."""

    @property
    def policy(self) -> str: ...
    @property
    def mode(self) -> Literal["apply", "advise"]: ...
    @property
    def preset(self) -> Preset | None: ...
    @property
    def alpha(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def gamma(self) -> float: ...
    @property
    def gain(self) -> Gain | None: ...
    @property
    def diversity_reference(self) -> Literal["uniform", "proportional", "prior"] | None: ...
    @property
    def smoothing(self) -> float | None: ...
    @property
    def constraints(self) -> MixtureConstraints: ...
    @property
    def max_epochs(self) -> float | Mapping[str, float] | None: ...
    @property
    def candidates(self) -> int: ...
    @property
    def require_audit(self) -> bool: ...
    def settled(self) -> "RemixSettings":
        """The same, with what is None given by the preset."""


class Decider:
    """Decides at the boundaries of a run.

    A domain whose gradient was not finite keeps its weight, and a task whose gradient was not is
    left out; both are named in the reason. What former boundaries measured is read and fitted
    once, and kept.

    Args:
        settings: policy, goal and constraints.
        seed: of bootstrap draws, candidates and the surrogate.
        task_weights: what each task counts for, by name.
        samples_per_epoch: of each domain; their order is that of the schedule's domains.
    """

    def __init__(
        self,
        settings: RemixSettings,
        *,
        seed: int,
        task_weights: Mapping[str, float],
        samples_per_epoch: Mapping[str, int],
    ) -> None:
        self._settings = settings.settled()
        self._seed = seed
        self._task_weights = dict(task_weights)
        self._samples_per_epoch = dict(samples_per_epoch)
        self._history = History(tuple(task_weights))

    def check(self, initial: Mixture, interval_samples: int) -> None:
        """Solve once on no influence at all, for what the settings may have wrong.

        Raises:
            InputError: the configured constraints name an unknown domain, or cannot hold together.
        """
        nothing_VD = np.zeros((len(self._task_weights), len(initial)))
        nothing = InfluenceMatrix(
            nothing_VD,
            domains=list(initial),
            tasks=list(self._task_weights),
            standard_error_VD=nothing_VD,
        )
        start = Boundary(
            stage=1,
            iteration=0,
            prior=initial,
            consumed=dict.fromkeys(initial, 0),
            interval_samples=interval_samples,
            ledger=[],
        )
        _solve_d(nothing, initial, self.rules(start))

    def rules(self, at: Boundary) -> Rules:
        """Return what a boundary decides by.

        Raises:
            InputError: settings that name an unknown domain.
        """
        settings = self._settings
        references = {
            "uniform": None,
            "proportional": Mixture.proportional(self._samples_per_epoch),
            "prior": floored(at.prior),
        }
        limits = {
            field.name: getattr(settings.constraints, field.name)
            for field in fields(MixtureConstraints)
        }
        paper = settings.preset == "paper"
        caps = {}
        if settings.max_epochs is not None:
            caps = epoch_caps(
                self._samples_per_epoch, at.consumed, at.interval_samples, settings.max_epochs
            )
        return Rules(
            policy="tikmix_m" if settings.policy == "tikmix_m" else "tikmix_d",
            goal=Goal(
                alpha=settings.alpha,
                beta=settings.beta,
                gamma=settings.gamma,
                gain=settings.gain or "linear",
                raw_sum=paper,
                task_weights=None if paper else self._task_weights,
                reference=references[settings.diversity_reference or "prior"],
            ),
            constraints=MixtureConstraints(**{**limits, "epoch_caps": caps}),
            tasks=tuple(self._task_weights),
            smoothing=settings.smoothing or 0.0,
            mode=settings.mode,
            candidates=settings.candidates,
            require_audit=settings.require_audit,
            seed=self._seed,
        )

    def budget(self, at: Boundary, precision: float) -> AdaptiveBudget:
        """Return the rule that adds sub-batches until the mixture is settled.

        Every rank may make one; only the main rank, which knows all of `at`, may ask it.
        """
        remembered: dict[Any, FormerInfluence] = {}  # a domain may be lost as the probe grows

        def solve(influence: InfluenceMatrix) -> Mixture:
            rules, latest = self.rules(at), joint_influence(influence)
            names = latest.tasks, latest.domains
            if names not in remembered:
                former = self._history.before(at.ledger, rules.smoothing, has_own_rows(influence))
                remembered[names] = FormerInfluence(former, rules.smoothing, *names)
            solved_on = _with_former(remembered[names], rules.smoothing, latest)
            return _solve_d(solved_on, at.prior, rules).mixture

        return AdaptiveBudget(
            precision,
            solve,
            defaultdict(float, self._task_weights),  # the domains' own rows weigh nothing
            _generator(self._seed, "budget", at.stage),
        )

    def decide(self, bank: SubBatchBank, at: Boundary, measure: Measure | None = None) -> Decision:
        """Return the decision on what the probe measured.

        Args:
            measure: measures candidates for TiKMiX-M; None: by the influence that TiKMiX-D
                solves on.
        """
        measured = Measured(bank)
        try:
            rules = self.rules(at)
        except InputError as error:  # the other ranks wait for a decision, whatever it is
            reason = f"no mixture can be decided: {error}"
            return Decision(at.prior, source="kept", reason=reason, measured=measured)
        return _decided(measured, at.prior, rules, at.stage, at.ledger, self._history, measure)


def decide_again(
    ledger: Sequence[StageRow],
    stage: int,
    *,
    goal: Goal | None = None,
    constraints: MixtureConstraints | None = None,
) -> Decision:
    """Decide a stage of a run again, from its ledger alone.

    Without arguments it is the decision that was made, to the bit where versions and
    the number of threads (OMP_NUM_THREADS) are the same.
    TiKMiX-M takes the candidates that were measured then, whatever the goal.

    ::

        ledger = Ledger.read("runs/quickstart")
        row = ledger[3]
        wider = replace(row.rules.goal, gamma=0.5)
        decide_again(ledger, 3, goal=wider).mixture

    Args:
        goal, constraints: in place of those that were decided by.

    Raises:
        InputError: there is no such stage, nothing was measured for it, its bank file is missing,
            an earlier version wrote the row, or the goal's task weights do not name its tasks.
    """
    rows = {row.stage: row for row in ledger}
    if stage not in rows or stage - 1 not in rows:
        raise InputError(
            f"stage {stage} was not decided; the stages of this ledger that can have been are "
            f"{', '.join(str(number) for number in rows if number - 1 in rows) or 'none'}"
        )
    row, prior = rows[stage], _prior(rows[stage - 1], rows[stage])
    measured = row.read_measured()
    if measured is None:
        raise InputError(f"stage {stage}: nothing was measured for it: {row.reason}")
    if row.rules is None:
        raise InputError(
            f"stage {stage} was written by an earlier version: its row lacks the goal and the "
            f"constraints that it was decided by; later stages of the run, once it is resumed "
            f"with this version, have them"
        )
    rules = replace(
        row.rules,
        goal=goal or row.rules.goal,
        constraints=constraints or row.rules.constraints,
    )
    former = [each for each in ledger if each.stage < stage]
    history = History(rules.tasks)
    decision = _decided(measured, prior, rules, stage, former, history)
    same = rules == row.rules
    return decision.after(row.audit, prior, rules.require_audit) if same else decision


def _prior(former: StageRow, row: StageRow) -> Mixture:
    """Return the mixture in force before a stage, over the domains of the stage."""
    return Mixture({name: former.weights.get(name, 0.0) for name in row.weights})


class History:
    """The influence that former boundaries measured, as a decision averages it.

    Each is read and fitted once. A bank that cannot be read is named in a warning, and left out.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self._tasks = list(tasks)
        self._fitted: dict[tuple[int, bool], InfluenceMatrix | None] = {}
        self._unreadable: set[int] = set()

    def before(
        self, ledger: Sequence[StageRow], smoothing: float, joint: bool
    ) -> list[InfluenceMatrix]:
        """Return the matrices that have a part in an average, in the order of the stages.

        Args:
            joint: whether they are to be joint influence, of which a stage that measured no
                domain's own rows says nothing.
        """
        most = most_remembered(smoothing)
        found: list[InfluenceMatrix] = []
        for row in reversed(ledger):
            if len(found) == most:
                break
            key = row.stage, joint
            if key not in self._fitted:
                bank = self._bank(row)
                self._fitted[key] = None if bank is None else self._matrix(bank, joint)
            matrix = self._fitted[key]
            if matrix is not None:
                found.append(matrix)
        return found[::-1]

    def last_bank(self, ledger: Sequence[StageRow]) -> SubBatchBank | None:
        """Return what the last boundary that measured anything measured of the deciding tasks."""
        for row in reversed(ledger):
            if (bank := self._bank(row)) is not None:
                return bank.of_tasks(self._tasks)
        return None

    def _bank(self, row: StageRow) -> SubBatchBank | None:
        if row.measured is None or row.stage in self._unreadable:
            return None
        try:
            measured = row.read_measured()
        except InputError as error:
            self._unreadable.add(row.stage)
            _log.warning("%s; decisions go on without it", error)
            return None
        return None if measured is None else measured.bank

    def _matrix(self, bank: SubBatchBank, joint: bool) -> InfluenceMatrix | None:
        of_tasks = bank.of_tasks(self._tasks)
        usable = of_tasks.usable()
        if not usable.domains or not usable.tasks:
            return None
        if not joint:
            return of_tasks.influence_matrix()
        matrix = bank.influence_matrix()
        return joint_influence(matrix) if has_own_rows(matrix) else None


def _decided(
    measured: Measured,
    prior: Mixture,
    rules: Rules,
    stage: int,
    ledger: Sequence[StageRow],
    history: History,
    measure: Measure | None = None,
) -> Decision:
    """Return the decision of a stage on what was measured for it and before it."""
    bank = measured.bank
    lost = _lost(bank)
    usable = bank.usable().of_tasks(rules.tasks)
    if not usable.domains or not usable.tasks:
        return Decision(prior, source="kept", reason=lost, measured=measured)
    found = Decision(prior, measured=measured)
    if (before := history.last_bank(ledger)) is not None:
        after = bank.of_tasks(rules.tasks)
        stability = rank_stability(before, after, _generator(rules.seed, "ranks", stage))
        found = replace(found, rank_stability=stability)
    matrix = bank.influence_matrix()
    former = history.before(ledger, rules.smoothing, has_own_rows(matrix))
    latest = joint_influence(matrix)
    remembered = FormerInfluence(former, rules.smoothing, latest.tasks, latest.domains)
    influence = _with_former(remembered, rules.smoothing, latest)
    rules = rules.on(influence, prior)
    found = replace(found, influence=influence, rules=rules)
    try:
        solution, candidates = _solved(influence, prior, rules, stage, measured.candidates, measure)
    except InputError as error:  # caps that nothing fits any more, for example
        return replace(found, source="kept", reason=f"no mixture can be decided: {error}")

    def solve(drawn: InfluenceMatrix) -> Mixture:
        redrawn = _with_former(remembered, rules.smoothing, joint_influence(drawn))
        return _solve_d(redrawn, prior, rules).mixture

    noise = sensitivity(bank, solve, _generator(rules.seed, "redraw", stage)).total_variation
    source, reason = _verdict(solution, prior, noise, rules)
    return replace(
        found,
        mixture=prior if source == "kept" else solution.mixture.rounded(),
        source=source,
        reason="; ".join(filter(None, [reason, lost])),
        measured=Measured(bank, candidates),
        solution=solution,
        total_variation_noise=noise,
    )


def _verdict(
    solution: MixtureSolution, prior: Mixture, noise: float, rules: Rules
) -> tuple[str, str]:
    """Return where the next mixture comes from, and why."""
    moved = solution.mixture.rounded().total_variation(prior)
    forced = solution.prior_violation > 0
    if moved == 0:
        active = ", ".join(solution.active_constraints[:4]) or "none"
        best = f"no mixture within the constraints is better (those that bind: {active})"
        return "kept", solution.reason or best
    if rules.mode == "advise":
        return "kept", f"remix.mode is advise; a change of {moved:.3f} was found"
    if solution.status == "fallback":
        return "fallback", solution.reason
    if forced:
        broken = "the mixture in force breaks a constraint"
        return rules.policy, "; ".join(filter(None, [broken, solution.reason]))
    if moved <= noise:
        return "kept", (
            f"the change of {moved:.3f} is within what noise alone would move the answer, "
            f"{noise:.3f}"
        )
    reason = f"the change of {moved:.3f} is beyond the noise of the answer, {noise:.3f}"
    return rules.policy, "; ".join(filter(None, [reason, solution.reason]))


def _with_former(
    former: FormerInfluence, smoothing: float, latest: InfluenceMatrix
) -> InfluenceMatrix:
    """Return what is solved on: the latest influence, averaged with what was measured before."""
    return former.averaged_with(latest) if smoothing else latest


def _solve_d(influence: InfluenceMatrix, prior: Mixture, rules: Rules) -> MixtureSolution:
    """Return TiKMiX-D's answer; a domain of unknown influence keeps its weight."""
    rules = rules.on(influence, prior)
    matrix = completed(influence, list(prior))
    return solve_tikmix_d(matrix, prior, rules.goal, rules.constraints)


def _solved(
    influence: InfluenceMatrix,
    prior: Mixture,
    rules: Rules,
    stage: int,
    known: MeasuredCandidates | None,
    measure: Measure | None,
) -> tuple[MixtureSolution, MeasuredCandidates | None]:
    """Return the policy's answer, and the candidates that were measured for it."""
    if rules.policy == "tikmix_d":
        return _solve_d(influence, prior, rules), None
    matrix = completed(influence, list(prior))
    kept = [known] if known is not None else []

    def measured(weights_ND: Array) -> Array:
        """Candidates over the matrix's domains, to outcomes of its tasks."""
        assert measure is not None
        by_name = dict(zip(matrix.domains, weights_ND.T, strict=True))
        outcomes_NV = measure(np.stack([by_name[name] for name in prior], axis=1))
        asked = list(rules.tasks)
        outcomes_NV = outcomes_NV[:, [asked.index(task) for task in matrix.tasks]]
        kept.append(MeasuredCandidates(weights_ND, outcomes_NV))
        return outcomes_NV

    try:
        solution = solve_tikmix_m(
            matrix,
            prior,
            rules.goal,
            rules.constraints,
            measure=None if measure is None else measured,
            measured=known,
            candidates=rules.candidates,
            seed=derived_seed(rules.seed, "tikmix_m", stage) >> 1,
        )
    except RolloutError as error:  # training itself is as it was
        first = _solve_d(influence, prior, rules)
        reason = f"{error}: the answer is TiKMiX-D's"
        solution = replace(first, reason="; ".join(filter(None, [first.reason, reason])))
    return solution, kept[0] if kept else None


def _generator(seed: int, purpose: str, stage: int) -> np.random.Generator:
    return np.random.default_rng(derived_seed(seed, purpose, stage))


def _lost(bank: SubBatchBank) -> str:
    """Return which gradients were not finite and what follows; empty if all were."""
    parts = []
    if bank.bad_domains:
        parts.append(
            f"the gradient of {', '.join(bank.bad_domains)} is not finite: the weight stays"
        )
    if bank.bad_tasks:
        parts.append(f"the gradient of task {', '.join(bank.bad_tasks)} is not finite: left out")
    return "; ".join(parts)
