"""TiKMiX-D: the mixture that minimises the objective on a measured influence matrix."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, minimize

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing.constraints import MixtureConstraints
from megatron_tikmix.mixing.influence_matrix import InfluenceMatrix
from megatron_tikmix.mixing.mixture import Mixture
from megatron_tikmix.mixing.objective import Objective
from megatron_tikmix.mixing.solution import MixtureSolution

Array = NDArray[np.float64]

_TOLERANCE = 1e-8  # a constraint may be broken by so much; within it, a constraint is active
_SMOOTHING = 1e-8  # of the kink of std: the optimum moves by at most α times half of it, in L


def solve_tikmix_d(
    influence: InfluenceMatrix,
    prior: Mixture,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    task_weights: Mapping[str, float] | None = None,
    preset: Literal["paper"] | None = None,
    constraints: MixtureConstraints | None = None,
) -> MixtureSolution:
    """Minimise L(w) = α·std(P̂) − β·gain(P̂) − γ·H(w) within the constraints (method.md, §2).

    SLSQP with analytic derivatives, from the uniform mixture, or as far towards it as the limit
    on total variation allows. If its answer breaks a constraint by more than 1e-8 (in weight, or
    on normalised rows) or is worse than the prior, the prior is returned, with the reason.

    Args:
        influence: (V, D) in the benefit sign, rows of any scale; its errors are not used.
        prior: the mixture in force, over the same domains.
        alpha, beta, gamma: weights of uniformity over tasks, of the gain and of the entropy.
        task_weights: what each task counts for, by name; need not sum to 1 (default: equal).
        preset: `paper` takes the raw sum over tasks as the gain.
        constraints: default :class:`MixtureConstraints`.

    Raises:
        InputError: `prior` and `influence` name different domains, or an argument is out of
            range.
    """
    started = time.perf_counter()
    _check(alpha=alpha, beta=beta, gamma=gamma, task_weights=task_weights, preset=preset)
    # Solved in the order of the names: the order the caller happens to use cannot matter.
    matrix = influence.sorted_by_name()
    problem = _Problem(
        objective=Objective.of(
            matrix.values_VD,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            task_weights_V=_task_weights(task_weights, matrix.tasks),
            preset=preset,
        ),
        constraints=constraints or MixtureConstraints(),
        domains=matrix.domains,
        tasks=matrix.tasks,
        prior_D=prior.array(matrix.domains),
    )
    weights_D, solver = problem.minimise()
    reason = problem.objection(weights_D)
    mixture = prior
    if not reason:
        by_name = dict(zip(matrix.domains, weights_D.tolist(), strict=True))
        mixture = Mixture({name: by_name[name] for name in prior})
    facts = problem.describe(mixture.array(matrix.domains))
    for gains in ("gain_before", "gain_after"):
        facts[gains] = {task: facts[gains][task] for task in influence.tasks}
    return MixtureSolution(
        mixture=mixture,
        status="fallback" if reason else "solved",
        reason=reason,
        effective_domains=mixture.effective_domains,
        total_variation=prior.total_variation(mixture),
        solve_seconds=time.perf_counter() - started,
        **facts,
        **solver,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Problem:
    """What is to be minimised, within what; domains and tasks in the order of their names."""

    objective: Objective
    constraints: MixtureConstraints
    domains: Sequence[str]
    tasks: Sequence[str]
    prior_D: Array

    def minimise(self) -> tuple[Array, dict[str, Any]]:
        """SLSQP's answer (D,), and what it says of itself.

        The variables are p, q ≥ 0 with w = prior + p − q: so the total variation is Σp, and the
        bounds on w are bounds on p and q.
        """

        def value_and_gradient(moves: Array) -> tuple[float, Array]:
            value, slope_D = self.objective.value_and_gradient(self._mixture(moves), _SMOOTHING)
            return value, np.concatenate([slope_D, -slope_D])

        answer = minimize(
            value_and_gradient,
            self._start(),
            jac=True,
            method="SLSQP",
            bounds=self._bounds(),
            constraints=self._linear_constraints(),
            options={"ftol": 1e-14, "maxiter": 500},
        )
        return self._tidied(self._mixture(answer.x)), {
            "solver_status": int(answer.status),
            "solver_message": str(answer.message),
            "iterations": int(answer.nit),
        }

    def _mixture(self, moves: Array) -> Array:
        p_D, q_D = np.split(moves, 2)
        return self.prior_D + p_D - q_D

    def _tidied(self, weights_D: Array) -> Array:
        """The weights without the solver's rounding: a mixture, no further than the limit."""
        weights_D = weights_D.clip(min=0)
        move_D = weights_D / weights_D.sum() - self.prior_D
        return self.prior_D + self._within_limit(move_D)

    def _within_limit(self, move_D: Array) -> Array:
        """The move, cut short where its total variation is above the limit."""
        return move_D * (self._limit / max(0.5 * np.abs(move_D).sum(), self._limit))

    @property
    def _limit(self) -> float:
        return self.constraints.max_total_variation or 1.0  # no two mixtures are further apart

    def _start(self) -> Array:
        """p, q towards the uniform mixture, as far as the limit allows."""
        move_D = self._within_limit(1 / len(self.prior_D) - self.prior_D)
        return np.concatenate([move_D.clip(min=0), (-move_D).clip(min=0)])

    def _bounds(self) -> Bounds:
        lower_D, upper_D = self.constraints.bounds(self.domains)
        room_D, surplus_D = upper_D - self.prior_D, self.prior_D - lower_D
        least = np.concatenate([-surplus_D, -room_D])  # above 0 where the prior breaks a bound
        return Bounds(least.clip(min=0), np.concatenate([room_D, surplus_D]).clip(min=0))

    def _linear_constraints(self) -> list[LinearConstraint]:
        """Σp − Σq = 0, Σp ≤ limit and, where it is asked for, Pareto."""
        ones_D, zeros_D = np.ones_like(self.prior_D), np.zeros_like(self.prior_D)
        rows_VD = self.objective.rows_VD if self.constraints.pareto else np.empty((0, len(ones_D)))
        least = np.concatenate([[-self._limit], np.zeros(len(rows_VD))])
        return [
            LinearConstraint(np.block([ones_D, -ones_D])[None], 0.0, 0.0),
            LinearConstraint(np.block([[-ones_D, zeros_D], [rows_VD, -rows_VD]]), least, np.inf),
        ]

    def slacks(self, weights_D: Array) -> dict[str, float]:
        """What is left of every constraint, by name."""
        return self.constraints.slacks(
            weights_D, self.prior_D, self.objective.rows_VD, self.domains, self.tasks
        )

    def objection(self, weights_D: Array) -> str:
        """Why these weights must not be used, in words; empty if they may."""
        if not np.isfinite(weights_D).all():
            return "the solver returned weights that are not finite; the mixture is kept"
        slacks = self.slacks(weights_D)
        worst = min(slacks, key=lambda name: slacks[name])
        if slacks[worst] < -_TOLERANCE:
            return (
                f"the solver's answer breaks the constraint {worst} by {-slacks[worst]:.2g}; "
                "the mixture is kept"
            )
        excess = self.objective.value(weights_D) - self.objective.value(self.prior_D)
        if excess > _TOLERANCE and min(self.slacks(self.prior_D).values()) >= -_TOLERANCE:
            return (
                f"the solver's answer is worse than the prior by {excess:.2g}; the mixture is kept"
            )
        return ""

    def describe(self, weights_D: Array) -> dict[str, Any]:
        """The fields of :class:`MixtureSolution` that follow from the weights."""
        objective = self.objective
        before_V, after_V = objective.rows_VD @ self.prior_D, objective.rows_VD @ weights_D
        return {
            "objective": objective.value(weights_D),
            "uniformity": objective.uniformity(after_V)[0],
            "gain": objective.gain(after_V)[0],
            "diversity": objective.diversity(weights_D)[0],
            "gain_before": dict(zip(self.tasks, before_V.tolist(), strict=True)),
            "gain_after": dict(zip(self.tasks, after_V.tolist(), strict=True)),
            "active_constraints": [
                name for name, slack in self.slacks(weights_D).items() if slack <= _TOLERANCE
            ],
        }


def _check(
    *, task_weights: Mapping[str, float] | None, preset: str | None, **weights: float
) -> None:
    for name, value in weights.items():
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{name} is {value}; it must be a finite number, zero or more")
    if preset not in (None, "paper"):
        raise InputError(f"preset is {preset!r}; it must be 'paper' or None")
    if preset == "paper" and task_weights is not None:
        raise InputError("task_weights: the preset 'paper' takes the raw sum; leave them out")


def _task_weights(given: Mapping[str, float] | None, tasks: Sequence[str]) -> Array | None:
    if given is None:
        return None
    if set(given) != set(tasks):
        raise InputError(
            f"task_weights: they name {sorted(given)}; the influence matrix has {sorted(tasks)}"
        )
    weights_V = np.array([given[task] for task in tasks], dtype=np.float64)
    if not np.isfinite(weights_V).all() or (weights_V < 0).any() or not weights_V.any():
        raise InputError(
            "task_weights: each must be a finite number, zero or more, and one above zero"
        )
    return weights_V
