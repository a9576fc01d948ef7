"""TiKMiX-M: the mixture that minimises the objective on outcomes measured and learnt."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.candidates import box_around, pulled_inside, sample_box
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Goal, Preset
from megatron_tikmix.solve.region import FEASIBLE, Region
from megatron_tikmix.solve.solution import MixtureSolution
from megatron_tikmix.solve.surrogate import MixtureSurrogate
from megatron_tikmix.solve.tikmix_d import Problem, of_preset, solve_tikmix_d

Array = NDArray[np.float64]
Measure = Callable[[Array], Array]
"""weights_ND -> outcomes_NV: the drop of each task's loss under each candidate, higher is better,
in any unit per task; NaN where a candidate could not be measured."""


@dataclass(frozen=True, eq=False)
class MeasuredCandidates:
    """Candidates with their outcomes, in the order of a matrix's domains and tasks.

    Attributes:
        weights_ND: the candidates, float64 (N, D).
        outcomes_NV: what :data:`Measure` returned of them, float64 (N, V).
    """

    weights_ND: Array
    outcomes_NV: Array


FEWEST_CANDIDATES = 16
"""The fewest candidates to ask for; 13 of them must be measured, for the skill to be known."""

_FEWEST_MEASURED = 13
_BROKEN = 1e9  # added to L where Pareto is broken: ranks below everything that keeps it
_WEIGHT_FLOOR = 1e-3  # of the uniform weight: the least parameter of a Dirichlet


def solve_tikmix_m(
    influence: InfluenceMatrix,
    prior: Mixture,
    goal: Goal | None = None,
    constraints: MixtureConstraints | None = None,
    *,
    preset: Preset = "default",
    measure: Measure | None = None,
    measured: MeasuredCandidates | None = None,
    candidates: int = 64,
    scales: tuple[float, float] = (0.5, 2.0),
    min_skill: float = 0.5,
    rounds: int = 16,
    samples: int = 1000,
    top: int = 16,
    concentrations: tuple[float, float] = (3.0, 1e4),
    seed: int = 0,
) -> MixtureSolution:
    """TiKMiX-D's objective and constraints, on outcomes measured instead of S w (method.md, §3).

    1. TiKMiX-D's answer, with the same arguments.
    2. Candidates: it, the prior, and Latin hypercube samples of a box around it, stretched to
       hold the prior: what lies between the two must be known as well.
    3. Their outcomes, by `measure`.
    4. A :class:`MixtureSurrogate` of the outcomes, f_i(w), and its cross-validated skill.
    5. L(w) is minimised with P̂_i = f_i(w)/m_i in place of S_i w/n_i. The unit m_i is
       n_i · rms(f_i)/rms(S_i w), root mean squares over the candidates as measured: P̂_i is as
       large on the candidates as D's own prediction, so α, β and γ mean what they mean there,
       and the unit of an outcome does not matter. Search in rounds, from the best of the
       candidates: each draws mixtures from a Dirichlet around the best one so far, and goes on
       from the mean of the top few. Its concentration rises geometrically: wide first, narrow
       last.

    The constraints are D's. Mixtures are pulled inside the convex ones; Pareto goes by the
    surrogate, f_i(w) ≥ f_i(prior) (`confidence` is about errors of the influence and has no part
    in it). The search stays in the box, which is what the surrogate knows.

    D's answer is returned, and `reason` says so, when the skill is poor, when too few candidates
    could be measured, or when nothing is predicted to be better.

    Args:
        influence, prior, goal, constraints, preset: as for :func:`solve_tikmix_d`.
        measure: ``measure(weights_ND) -> outcomes_NV``, float64, columns in the order of
            `influence.domains` and `influence.tasks`: real short continuations, or the influence
            of the candidates from the bank. None: S w itself.
        measured: candidates whose outcomes are known from before, in place of `measure`.
        candidates: how many are measured, the prior and D's answer among them; at least 16.
        scales: the box, as multiples of the weights of D's answer; a domain of weight 0 there and
            in the prior stays at 0.
        min_skill: least rank correlation (Spearman) of held-out predictions with outcomes,
            averaged over tasks by their weights.
        rounds, samples, top: of the search.
        concentrations: of the first and the last round's Dirichlet, times the number of domains:
            c gives an average weight a relative standard deviation of about c^−½.
        seed: of the candidates, the surrogate and the search, 0 to 2³¹ − 1.

    Returns:
        the mixture, with uniformity, gain and gains per task as predicted, in D's units. Without
        a certificate: there is no proof of optimality. `details`, by task where it applies:
        `candidates` and `not_measured`, counts; `skill` (`spearman`, `r2`) and `mean_skill`;
        `predicted_objective` of the prior, D's answer and the answer; `predicted_pareto`, the
        least slack of the latter two; `rounds` (`concentration`, `objective`).

    Raises:
        InputError: an argument is out of range, as for :func:`solve_tikmix_d`, or `measure`
            returns the wrong shape.
    """
    started = time.perf_counter()
    _check(candidates, min_skill, rounds, samples, top, concentrations)
    surrogate = MixtureSurrogate(seed=seed)
    goal, constraints = of_preset(preset, prior, goal, constraints)
    first = solve_tikmix_d(influence, prior, goal, constraints)
    problem, concession = Problem.of(influence, prior, goal, constraints).made_feasible()
    start_D = first.mixture.array(problem.domains)
    origin_D = problem.region.origin_D
    box = box_around(start_D, problem.region, scales, also_D=origin_D)
    inside_D = (start_D + origin_D) / 2
    if measured is None:
        weights_ND = _candidates(box, start_D, inside_D, candidates, seed)
        outcomes_NV = _outcomes(measure, weights_ND, influence, problem)
    else:
        weights_ND = measured.weights_ND[:, [influence.domains.index(n) for n in problem.domains]]
        outcomes_NV = measured.outcomes_NV[:, [influence.tasks.index(n) for n in problem.tasks]]
    asked = len(weights_ND)
    measured_N = np.isfinite(outcomes_NV).all(axis=1)
    weights_ND, outcomes_NV = weights_ND[measured_N], outcomes_NV[measured_N]
    details: dict[str, Any] = {"candidates": asked, "not_measured": asked - len(weights_ND)}

    def answer_of_d(why: str) -> MixtureSolution:
        return replace(
            first,
            reason="; ".join(filter(None, [first.reason, f"{why}: the answer is TiKMiX-D's"])),
            details=details,
            solve_seconds=time.perf_counter() - started,
        )

    if len(weights_ND) < _FEWEST_MEASURED:
        return answer_of_d(f"only {len(weights_ND)} of {asked} candidates were measured")
    if np.ptp(weights_ND, axis=0).max() <= FEASIBLE:
        return answer_of_d("the constraints leave no room for candidates")
    skill = surrogate.cross_validate(weights_ND, outcomes_NV)
    mean_skill = float(problem.objective.task_weights_V @ skill.spearman_V)
    by_task = {
        task: {
            "spearman": float(skill.spearman_V[problem.tasks.index(task)]),
            "r2": float(skill.r2_V[problem.tasks.index(task)]),
        }
        for task in influence.tasks
    }
    details |= {"skill": by_task, "mean_skill": mean_skill}
    if mean_skill < min_skill:
        return answer_of_d(
            f"the surrogate's mean rank correlation is {mean_skill:.2f}, below min_skill, "
            f"{min_skill}"
        )
    predicted = _Prediction.of(surrogate, weights_ND, outcomes_NV, problem)
    weights_D, history = _search(
        predicted,
        box,
        weights_ND,
        inside_D,
        np.geomspace(*concentrations, rounds) * len(start_D),
        samples,
        top,
        seed,
    )
    details |= {
        "rounds": history,
        "predicted_objective": {
            "prior": predicted.objective_of(box.prior_D),
            "tikmix_d": predicted.objective_of(start_D),
            "answer": predicted.objective_of(weights_D),
        },
        "predicted_pareto": {
            "tikmix_d": predicted.pareto_left(start_D),
            "answer": predicted.pareto_left(weights_D),
        },
    }
    before, after = predicted.ranks(np.stack([start_D, weights_D]))
    if after >= _BROKEN:
        return answer_of_d("no mixture is predicted to keep Pareto")
    broken, name = problem.region.without_pareto().violation(weights_D)
    if broken > FEASIBLE:
        return answer_of_d(f"the answer of the search breaks the constraint {name} by {broken:.2g}")
    if after >= before:
        return answer_of_d("no mixture is predicted to be better")
    by_name = dict(zip(problem.domains, weights_D.tolist(), strict=True))
    mixture = Mixture({name: by_name[name] for name in prior})
    described = problem.describe(
        mixture,
        prior,
        influence.tasks,
        status="solved",
        reason=concession,
        certificate=None,
        solver="dirichlet",
        solver_message=f"{rounds} rounds of {samples} mixtures",
        iterations=rounds,
        details=details,
        solve_seconds=time.perf_counter() - started,
    )
    return predicted.describe(described, box.prior_D, weights_D)


@dataclass(frozen=True, eq=False)
class _Prediction:
    """L(w) and Pareto with the surrogate's outcomes in place of S w."""

    surrogate: MixtureSurrogate
    problem: Problem
    per_unit_V: Array
    """1/m_i, times n_i: a prediction times it is P̂_i."""
    origin_V: Array
    """P̂ of the mixture that Pareto compares with."""

    @classmethod
    def of(
        cls, surrogate: MixtureSurrogate, weights_ND: Array, outcomes_NV: Array, problem: Problem
    ) -> "_Prediction":
        """The surrogate fitted, and its units."""
        surrogate.fit(weights_ND, outcomes_NV)
        linear_V = np.sqrt(((weights_ND @ problem.objective.rows_VD.T) ** 2).mean(axis=0))
        measured_V = np.sqrt((outcomes_NV**2).mean(axis=0))
        per_unit_V = linear_V / np.where(measured_V > 0, measured_V, np.inf)
        origin_V = per_unit_V * surrogate.predict(problem.region.origin_D[None])[0]
        return cls(surrogate, problem, per_unit_V, origin_V)

    def gains(self, weights_ND: Array) -> Array:
        """P̂, (N, V)."""
        return self.surrogate.predict(weights_ND) * self.per_unit_V

    def ranks(self, weights_ND: Array) -> Array:
        """L(w), (N,), and far above it, by how much is missing, where Pareto is broken."""
        gains_NV = self.gains(weights_ND)
        values_N = np.array(list(map(self._value, weights_ND, gains_NV)))
        left_N = self._pareto(gains_NV)
        return np.where(left_N < -FEASIBLE, _BROKEN * (1 - left_N), values_N)

    def objective_of(self, weights_D: Array) -> float:
        return self._value(weights_D, self.gains(weights_D[None])[0])

    def pareto_left(self, weights_D: Array) -> float | None:
        """The least of Pareto's slacks; None without Pareto."""
        left = float(self._pareto(self.gains(weights_D[None]))[0])
        return left if np.isfinite(left) else None

    def _value(self, weights_D: Array, gains_V: Array) -> float:
        objective = self.problem.objective
        return objective.combined(
            objective.uniformity(gains_V)[0],
            objective.gain(gains_V)[0],
            objective.diversity(weights_D)[0],
        )

    def _pareto(self, gains_NV: Array) -> Array:
        """The least slack over tasks, (N,)."""
        if not len(self.problem.region.rows_VD):
            return np.full(len(gains_NV), np.inf)
        return (gains_NV - self.origin_V).min(axis=1) + self.problem.region.slack

    def describe(
        self, solution: MixtureSolution, prior_D: Array, weights_D: Array
    ) -> MixtureSolution:
        """The solution with everything that depends on P̂ as predicted."""
        objective, tasks = self.problem.objective, self.problem.tasks
        before_V, after_V = self.gains(np.stack([prior_D, weights_D]))
        slack_V = after_V - self.origin_V + self.problem.region.slack
        active = [name for name in solution.active_constraints if not name.startswith("pareto:")]
        if len(self.problem.region.rows_VD):
            active += [f"pareto:{tasks[v]}" for v in np.flatnonzero(slack_V <= FEASIBLE).tolist()]
        return replace(
            solution,
            objective=self._value(weights_D, after_V),
            uniformity=objective.uniformity(after_V)[0],
            gain=objective.gain(after_V)[0],
            gain_before={task: float(before_V[tasks.index(task)]) for task in solution.gain_before},
            gain_after={task: float(after_V[tasks.index(task)]) for task in solution.gain_after},
            active_constraints=active,
        )


def _candidates(box: Region, start_D: Array, inside_D: Array, count: int, seed: int) -> Array:
    """What is measured: the mixture that Pareto compares with (the prior, where it is allowed),
    D's answer, and mixtures in the box; (N, D)."""
    given = [box.origin_D]
    if np.abs(start_D - box.origin_D).max() > FEASIBLE:
        given.append(start_D)
    drawn_ND = sample_box(box, start_D, count - len(given), seed)
    return np.vstack([*given, pulled_inside(drawn_ND, inside_D, box)])


def _outcomes(
    measure: Measure | None, weights_ND: Array, influence: InfluenceMatrix, problem: Problem
) -> Array:
    """The outcomes of the candidates, (N, V), in the order of `problem`'s tasks."""
    if measure is None:
        return weights_ND @ influence.sorted_by_name().values_VD.T
    as_given = [problem.domains.index(name) for name in influence.domains]
    outcomes_NV = np.array(measure(weights_ND[:, as_given]), dtype=np.float64)
    expected = (len(weights_ND), len(influence.tasks))
    if outcomes_NV.shape != expected:
        raise InputError(
            f"measure: it returned outcomes of shape {outcomes_NV.shape}; {expected[0]} candidates "
            f"and {expected[1]} tasks need {expected}"
        )
    return outcomes_NV[:, [influence.tasks.index(name) for name in problem.tasks]]


def _search(
    predicted: _Prediction,
    box: Region,
    measured_ND: Array,
    inside_D: Array,
    concentrations: Array,
    samples: int,
    top: int,
    seed: int,
) -> tuple[Array, list[dict[str, float]]]:
    """The best mixture found, (D,), and the rounds."""
    rng = np.random.Generator(np.random.Philox(key=[seed, 1]))
    history: list[dict[str, float]] = []
    best_D = measured_ND[np.argmin(predicted.ranks(measured_ND))]
    for concentration in concentrations.tolist():
        parameters_D = concentration * np.maximum(best_D, _WEIGHT_FLOOR / len(best_D))
        drawn_ND = pulled_inside(rng.dirichlet(parameters_D, samples), inside_D, box)
        order_N = np.argsort(predicted.ranks(drawn_ND), kind="stable")
        mean_D = drawn_ND[order_N[:top]].mean(axis=0)
        # The mean breaks no convex constraint; of Pareto, as predicted, one cannot be sure.
        contenders = np.stack([best_D, mean_D, drawn_ND[order_N[0]]])
        best_D = contenders[np.argmin(predicted.ranks(contenders))]
        history.append(
            {"concentration": concentration, "objective": predicted.objective_of(best_D)}
        )
    return best_D, history


def _check(
    candidates: int,
    min_skill: float,
    rounds: int,
    samples: int,
    top: int,
    concentrations: tuple[float, float],
) -> None:
    if candidates < FEWEST_CANDIDATES:
        raise InputError(
            f"candidates is {candidates}; a surrogate needs at least {FEWEST_CANDIDATES}"
        )
    if not -1 <= min_skill <= 1:
        raise InputError(f"min_skill is {min_skill}; it must be a rank correlation, from -1 to 1")
    if rounds < 1 or not 1 <= top <= samples:
        raise InputError(
            f"rounds, samples and top are {rounds}, {samples} and {top}; give at least 1 round, "
            "and a top between 1 and the samples"
        )
    if not 0 < concentrations[0] <= concentrations[1] < np.inf:
        raise InputError(
            f"concentrations are {concentrations}; they must be positive and rise, since a large "
            "one draws close mixtures"
        )
