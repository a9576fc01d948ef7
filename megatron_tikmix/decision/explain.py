"""Why a domain's weight is what it is: what pushed it, and what each push made of its change.

At a mixture w the objective L (see :class:`~megatron_tikmix.solve.objective.Objective`) pushes
domain j by

    −∂L/∂w_j = β Σ_i gain'_i R_ij  −  α Σ_i std'_i R_ij  +  γ diversity'_j

with R the normalised influence rows. At the optimum these terms, what the active constraints push,
and one number for all domains alike, since weights sum to 1, add up to 0. Terms of the objective
are given relative to their mean over the mixture.

The push of diversity is −γ (ln w_j/r_j − KL(w ‖ r)), with r the reference mixture. So with the
weight before, v_j, and what gain, uniformity, active constraints and the sum to 1 push, g_ij, u_j,
c_j and s,

    ln w_j/v_j = (Σ_i g_ij + u_j + c_j + s) / γ  +  ln r_j/v_j  +  KL(w ‖ r)

exactly. Times the logarithmic mean of w_j and v_j, which is (w_j − v_j) / ln(w_j/v_j), each term
becomes its part of the change of the weight, and they add up to it: the logarithmic mean Divisia
index, B. W. Ang, Energy Policy 32 (2004) 1131.

Everything is taken from the row of the ledger, which holds the goal that was solved.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.solution import MixtureSolution

Array = NDArray[np.float64]

KINK = 1e-5
"""Below it std(P̂), over the largest |P̂|, is 0 as far as a solver can tell: tasks gain alike."""

TINY = 1e-12
"""A weight below it has no logarithm to speak of."""

_FOLLOWED = 1e-4  # weights below it are too small for a solver's tolerance


@dataclass(frozen=True, kw_only=True)
class Change:
    """The parts of the change in weight from the mixture before to the solver's answer.

    All but `noise` add up to `total`.
    """

    gain: dict[str, float]
    """Part due to each task's gain."""

    uniformity: float
    constraints: float

    diversity: float
    """Towards the reference mixture; 0 where that is the mixture before."""

    shared: float
    """Part due to the common factor that makes the weights sum to 1."""

    search: float
    """Part due to TiKMiX-M's measured outcomes, beyond influence; 0 for a certified answer."""

    total: float
    """The answer's weight less the weight before."""

    noise: float | None
    """Standard error of gain and uniformity together, at most, at the answer."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What pushed one domain's weight at one boundary; positive pushes it up.

    All pushes are in units of the objective per unit of weight, at the mixture that was solved
    for. Those of the objective are relative to their mean over that mixture.
    """

    domain: str
    stage: int
    iteration: int
    source: str | None
    reason: str | None

    before: float
    """Weight in the stage before."""

    solved: float
    """Weight in the solver's answer, which is not followed where the mixture was kept."""

    after: float
    """Weight in the stage."""

    gain: dict[str, float]
    """Push of each task's gain, from the domain's influence on the task."""

    uniformity: float
    """Push of the gains' uniformity: up for a domain that serves the tasks that gain least. Where
    all gain alike, std has no slope, and this is the push that keeps them alike."""

    diversity: float
    """Push of diversity, entropy or the pull towards a reference mixture: up for a weight below it.
    """

    constraints: float | None
    """Push of the active constraints on the domain; 0 where none binds. None where the answer is no
    certified optimum (TiKMiX-M, fallback)."""

    shared: float | None
    """Push on all domains alike that makes the weights sum to 1 with those that constraints hold.
    None as above."""

    active_constraints: list[str]
    """Constraints on this domain, among others, that are met with equality."""

    noise: float | None
    """Standard error of the sum of gain and uniformity, from the errors of the domain's own
    influence; at most so much, whatever the correlation between tasks."""

    change: Change | None
    """The answer's change of the weight as a sum of parts; None where the goal has no diversity
    (γ = 0), which the parts are measured by."""

    total_variation: float | None
    total_variation_noise: float | None
    """How far the mixture moved, and what noise alone would move the answer."""

    note: str
    """Caveats of the explanation; empty if there are none."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)


def explain(former: StageRow, row: StageRow, domain: str) -> Explanation:
    """Return what pushed `domain` at the boundary between two stages.

    Args:
        former: the stage before `row`.

    Raises:
        InputError: nothing was solved there, the domain was not there yet, or an earlier version
            wrote the row, which then lacks the goal.
    """
    return Explainer(former, row).of(domain)


class Explainer:
    """The pushes at one boundary, of all its domains.

    Raises:
        InputError: nothing was solved there, or an earlier version wrote the row.
    """

    def __init__(self, former: StageRow, row: StageRow) -> None:
        if row.solution is None:
            raise InputError(f"stage {row.stage}: nothing was solved there: {row.reason}")
        objective = row.objective()
        if row.rules is None:
            raise InputError(
                f"stage {row.stage} was written by an earlier version: its row lacks the goal that "
                f"was solved, so its pushes are not known"
            )
        if objective is None:
            raise InputError(
                f"stage {row.stage}: an entry of its influence is not a number, so its pushes are "
                f"not known"
            )
        self._row, self._solution, self._objective = row, row.solution, objective
        self._groups = row.rules.constraints.groups
        self._domains = list(row.weights)
        self._solved_D = row.solution.mixture.array(self._domains)
        self._before_D = np.array([former.weights.get(name, 0.0) for name in self._domains])
        reference = row.rules.goal.reference or Mixture.uniform(self._domains)
        self._reference_D = reference.array(self._domains)
        self._certified = row.solution.certificate is not None
        self._held = [self._active(name) for name in self._domains]
        self._push()

    def _push(self) -> None:
        """Fill in what pushes each domain."""
        objective, w_D = self._objective, self._solved_D
        gains_V = objective.rows_VD @ w_D
        gain_V = objective.beta * objective.gain(gains_V)[1]
        std, std_V = objective.uniformity(gains_V)
        uniformity_V = -objective.alpha * std_V
        diversity_D = objective.gamma * self._diversity()
        self.gain_VD = _relative(gain_V[:, None] * objective.rows_VD, w_D)
        self.diversity_D = _relative(diversity_D, w_D)
        self.at_kink = bool(
            objective.alpha > 0 and len(gains_V) > 1 and std <= KINK * np.abs(gains_V).max()
        )
        smooth_D = self.gain_VD.sum(axis=0) + self.diversity_D
        if self.at_kink:
            uniformity_V = self._subgradient(smooth_D)
        self.uniformity_D = _relative(uniformity_V @ objective.rows_VD, w_D)
        pushed_D = smooth_D + self.uniformity_D
        free_D = self._free()
        # A domain that no constraint holds is pushed by nothing else than all domains alike.
        shared = -float(np.average(pushed_D[free_D], weights=w_D[free_D])) if free_D.any() else 0.0
        self.shared = shared
        self.constraints_D = np.where(free_D, 0.0, -pushed_D - shared)
        if not any(self._held):
            # What is left of a push is the solver's tolerance, and no constraint.
            self.constraints_D = np.zeros_like(w_D)
        self.price_V = gain_V + uniformity_V

    def _free(self) -> NDArray[np.bool_]:
        """Return which domains have a weight, and no active constraint, (D,)."""
        return np.array([not held for held in self._held]) & (self._solved_D > TINY)

    def _diversity(self) -> Array:
        """Return ∂ diversity/∂w, (D,)."""
        log_D = np.log(np.maximum(self._solved_D, TINY))
        return -(log_D + 1) + np.log(np.maximum(self._reference_D, TINY))

    def _subgradient(self, smooth_D: Array) -> Array:
        """Return the slope of −α·std at its kink that keeps the mixture where it is, (V,).

        Of those that do, for domains that no constraint holds, the smallest one.
        """
        rows_VD, free_D = self._objective.rows_VD, self._free()
        if not free_D.any():
            return np.zeros(len(rows_VD))
        # Weighted like the mixture, so that domains of no weight decide nothing.
        weight_D = np.sqrt(self._solved_D[free_D])
        columns_VD = rows_VD[:, free_D]
        mean_V1 = (columns_VD @ self._solved_D[free_D] / self._solved_D[free_D].sum())[:, None]
        target_D = smooth_D[free_D] - np.average(smooth_D[free_D], weights=weight_D**2)
        slope_V: Array = np.linalg.lstsq(
            ((columns_VD - mean_V1) * weight_D).T, -target_D * weight_D, rcond=1e-10
        )[0]
        return slope_V

    def of(self, domain: str) -> Explanation:
        """Return what pushed one domain.

        Raises:
            InputError: the domain was not there at this stage.
        """
        row, objective = self._row, self._objective
        if domain not in self._domains:
            raise InputError(
                f"stage {row.stage}: there was no domain {domain!r}; it had "
                f"{', '.join(self._domains[:12])}"
            )
        d = self._domains.index(domain)
        gain = dict(zip(_tasks(row), self.gain_VD[:, d].tolist(), strict=True))
        noise = self._noise(domain)
        found = Explanation(
            domain=domain,
            stage=row.stage,
            iteration=row.start_iteration,
            source=row.source,
            reason=row.reason,
            before=float(self._before_D[d]),
            solved=float(self._solved_D[d]),
            after=row.weights[domain],
            gain=gain,
            uniformity=float(self.uniformity_D[d]),
            diversity=float(self.diversity_D[d]),
            constraints=float(self.constraints_D[d]) if self._certified else None,
            shared=self.shared if self._certified else None,
            active_constraints=self._held[d],
            noise=noise,
            change=None,
            total_variation=row.total_variation,
            total_variation_noise=row.total_variation_noise,
            note="; ".join(_notes(row, self._solution, self.at_kink, objective.gamma)),
        )
        return replace(found, change=self._change(found, float(self._reference_D[d])))

    def _noise(self, domain: str) -> float | None:
        """Return the standard error of gain and uniformity together, at most."""
        influence = self._row.influence
        if influence is None or influence.standard_error_VD is None:
            return None
        if domain not in influence.domains:
            return None
        error_V = influence.standard_error_VD[:, influence.domains.index(domain)]
        return float(np.abs(self.price_V) @ (error_V / influence.scale_V))

    def _change(self, found: Explanation, reference: float) -> Change | None:
        """Return the change of a weight in its parts."""
        gamma, before, answer = self._objective.gamma, found.before, found.solved
        if gamma <= 0:
            return None
        total = answer - before
        if answer < TINY and (found.active_constraints or reference < TINY):
            # The limit of the parts below: what holds it at 0 takes all of it away.
            by_reference = reference < TINY
            return Change(
                gain=dict.fromkeys(found.gain, 0.0),
                uniformity=0.0,
                constraints=0.0 if by_reference else total,
                diversity=total if by_reference else 0.0,
                shared=0.0,
                search=0.0,
                total=total,
                noise=None,
            )
        # A domain that comes back has no weight to be measured from: its reference stands for it.
        start = before if before >= TINY else reference
        constraints = (found.constraints or 0.0) / gamma
        gain = {task: push / gamma for task, push in found.gain.items()}
        uniformity, diversity = found.uniformity / gamma, math.log(reference / start)
        shared = self._divergence() + (found.shared or 0.0) / gamma
        summed = math.fsum([*gain.values(), uniformity, constraints, diversity, shared])
        per_term = _per_term(start, max(answer, TINY), summed if self._certified else None)
        parts = Change(
            gain={task: per_term * term for task, term in gain.items()},
            uniformity=per_term * uniformity,
            constraints=per_term * constraints,
            diversity=per_term * diversity + start - before,
            shared=per_term * shared,
            search=0.0,
            total=total,
            noise=None if found.noise is None else abs(per_term) * found.noise / gamma,
        )
        if self._certified:
            return parts
        # A fallback is where the constraints drove it; TiKMiX-M goes by what it measured.
        rest = total - (per_term * summed + start - before)
        if self._solution.status == "fallback":
            return replace(parts, constraints=rest)
        return replace(parts, search=rest)

    def _divergence(self) -> float:
        """Return KL(w ‖ r) of the answer to the reference, with w over its whole."""
        held_D = self._solved_D > TINY
        w_D, r_D = self._solved_D[held_D], np.maximum(self._reference_D[held_D], TINY)
        return float(w_D @ np.log(w_D / r_D))

    def _active(self, domain: str) -> list[str]:
        """Return the active constraints on a domain, on a group of it, or on the mixture."""
        groups = {name for name, group in self._groups.items() if domain in group.domains}
        found = []
        for constraint in self._solution.active_constraints:
            kind, _, name = constraint.partition(":")
            of_mixture = kind in ("total_variation", "pareto")
            of_group = kind.startswith("group_") and name in groups
            if of_mixture or of_group or (name == domain and not kind.startswith("group_")):
                found.append(constraint)
        return found


def _relative(push: Array, weights_D: Array) -> Array:
    """Return pushes (…, D) less their mean over the mixture."""
    mean = (push * weights_D).sum(axis=-1, keepdims=True) / weights_D.sum()
    relative: Array = push - mean
    return relative


def _tasks(row: StageRow) -> Sequence[str]:
    assert row.influence is not None
    return row.influence.tasks


def _per_term(start: float, answer: float, summed: float | None) -> float:
    """Return what a unit of the terms of ln(answer/start) makes of the change.

    It is the logarithmic mean. A solver does not follow a weight far below its tolerance, whose
    logarithm is then not the sum of the terms: they share the change in proportion.
    """
    ratio = math.log(answer / start)
    mean = answer if abs(ratio) < 1e-9 else (answer - start) / ratio
    if summed is not None and min(answer, start) < _FOLLOWED and summed * ratio > 0:
        return (answer - start) / summed
    return mean


def _notes(row: StageRow, solution: MixtureSolution, at_kink: bool, gamma: float) -> Iterator[str]:
    if solution.status == "fallback":
        yield "the solver fell back to the nearest mixture that is allowed"
    elif solution.certificate is None:
        yield (
            "TiKMiX-M chose by measured candidates; the terms are those of the influence it "
            "started from"
        )
    if row.source == "kept":
        yield "the mixture was kept: the terms are those of the answer not followed"
    if at_kink:
        yield "all tasks gain alike there, and uniformity is what keeps it so"
    if gamma <= 0:
        yield "the goal has no diversity (gamma 0), so a change has no parts"
