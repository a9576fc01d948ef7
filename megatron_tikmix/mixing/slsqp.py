"""SLSQP with analytic derivatives: the paper's solver, for up to some tens of domains."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

from megatron_tikmix.mixing.certificate import Multipliers
from megatron_tikmix.mixing.objective import Objective
from megatron_tikmix.mixing.region import Region

Array = NDArray[np.float64]

_SMOOTHING = 1e-8  # of the kink of std: the optimum moves by at most α times half of it, in L
_CONE_TIP = 1e-9  # by so much the tip of a cone is cut off, where it has no derivative


@dataclass(frozen=True, eq=False)
class Answer:
    """What a solver found, and what it says of itself."""

    weights_D: Array
    multipliers: Multipliers
    solver: str
    status: str
    iterations: int


class _Constraints:
    """Every constraint but the bounds, as SLSQP wants them: of the moves (p, q), w = prior + p − q.

    So the total variation is Σp, and the bounds on w are bounds on p and q.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        ones_D = np.ones(len(region.prior_D))
        self.sum_row = np.concatenate([ones_D, -ones_D])[None]
        self.change_row = np.concatenate([-ones_D, 0 * ones_D])[None]
        self.groups_rows = np.hstack([region.groups_MD, -region.groups_MD])

    def mixture(self, moves: Array) -> Array:
        p_D, q_D = np.split(moves, 2)
        return self.region.prior_D + p_D - q_D

    def values(self, moves: Array) -> Array:
        """All inequalities, ≥ 0: groups, then the limit, then Pareto."""
        region, weights_D = self.region, self.mixture(moves)
        limit = [] if region.limit is None else [region.limit + (self.change_row @ moves)[0]]
        groups_M = region.groups_MD @ weights_D - region.group_least_M
        return np.concatenate([groups_M, limit, self._pareto(weights_D)[0]])

    def jacobian(self, moves: Array) -> Array:
        limit = self.change_row[: 0 if self.region.limit is None else 1]
        pareto_VD = self._pareto(self.mixture(moves))[1]
        return np.vstack([self.groups_rows, limit, np.hstack([pareto_VD, -pareto_VD])])

    def _pareto(self, weights_D: Array) -> tuple[Array, Array]:
        region = self.region
        move_D = weights_D - region.origin_D
        gained_V = region.rows_VD @ move_D + region.slack
        if region.errors_VD is None:
            return gained_V, region.rows_VD
        noise_VD = region.errors_VD * move_D
        length_V = np.sqrt((noise_VD**2).sum(axis=1) + _CONE_TIP**2)
        slope_VD = region.rows_VD - region.errors_VD * noise_VD / length_V[:, None]
        return gained_V - (length_V - _CONE_TIP), slope_VD

    def as_dicts(self) -> Any:
        given: list[dict[str, Any]] = [
            {"type": "eq", "fun": lambda x: self.sum_row @ x, "jac": lambda x: self.sum_row},
        ]
        if len(self.values(np.zeros(2 * len(self.region.prior_D)))):
            given.append({"type": "ineq", "fun": self.values, "jac": self.jacobian})
        return given

    def multipliers(self, weights_D: Array, std_V: Array, found: Array) -> Multipliers:
        """SLSQP's multipliers, `found`, in the order of :meth:`as_dicts`."""
        region = self.region
        M, limited = len(region.groups_MD), int(region.limit is not None)
        groups_M, change, pareto_V = np.split(found[1:], [M, M + limited])
        cones_VD = None
        if region.errors_VD is not None:
            noise_VD = region.errors_VD * (weights_D - region.origin_D)
            length_V = np.sqrt((noise_VD**2).sum(axis=1) + _CONE_TIP**2)
            cones_VD = -pareto_V[:, None] * noise_VD / length_V[:, None]
        return Multipliers(std_V, groups_M, float(change.sum()), pareto_V, cones_VD)


def solve(objective: Objective, region: Region) -> Answer:
    """Minimise L over the region, from the uniform mixture, or as far towards it as the limit on
    the total variation allows."""
    constraints = _Constraints(region)

    def value_and_gradient(moves: Array) -> tuple[float, Array]:
        value, slope_D = objective.value_and_gradient(constraints.mixture(moves), _SMOOTHING)
        return value, np.concatenate([slope_D, -slope_D])

    room_D, surplus_D = region.upper_D - region.prior_D, region.prior_D - region.lower_D
    least = np.concatenate([-surplus_D, -room_D]).clip(min=0)  # above 0 where the prior breaks one
    most = np.concatenate([room_D, surplus_D]).clip(min=0)
    answer = minimize(
        value_and_gradient,
        _start(region).clip(least, most),
        jac=True,
        method="SLSQP",
        bounds=Bounds(least, most),
        constraints=constraints.as_dicts(),
        options={"ftol": 1e-14, "maxiter": 500},
    )
    weights_D = constraints.mixture(answer.x)
    std_V = objective.uniformity(objective.rows_VD @ weights_D, _SMOOTHING)[1]
    # Where the bounds leave a single mixture, SciPy returns it without either of these.
    no_multipliers = np.zeros(1 + len(constraints.values(answer.x)))
    return Answer(
        weights_D,
        constraints.multipliers(weights_D, std_V, answer.get("multipliers", no_multipliers)),
        solver="slsqp",
        status=str(answer.message),
        iterations=int(answer.get("nit", 0)),
    )


def _start(region: Region) -> Array:
    """p, q towards the uniform mixture, as far as the limit allows."""
    move_D = 1 / len(region.prior_D) - region.prior_D
    if region.limit is not None:
        move_D = move_D * min(1.0, region.limit / max(0.5 * np.abs(move_D).sum(), 1e-300))
    return np.concatenate([move_D.clip(min=0), (-move_D).clip(min=0)])
