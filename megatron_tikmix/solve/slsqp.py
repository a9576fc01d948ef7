"""SLSQP with analytic derivatives: the paper's solver, for up to some tens of domains."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, minimize

from megatron_tikmix.solve.certificate import Multipliers
from megatron_tikmix.solve.objective import Objective
from megatron_tikmix.solve.region import Region

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

    So the total variation is Σp, and the bounds on w are bounds on p and q. The inequalities are
    rows·(p, q) + offset ≥ 0, in the order groups, limit, Pareto; with cones Pareto's have a part
    that is not linear.
    """

    def __init__(self, region: Region) -> None:
        self.region = region
        ones_D = np.ones(len(region.prior_D))
        self.sum_row = np.concatenate([ones_D, -ones_D])[None]
        limited = 0 if region.limit is None else 1
        self.pareto_from = len(region.groups_MD) + limited
        change_row = np.concatenate([-ones_D, 0 * ones_D])[None]
        self.rows = np.vstack(
            [
                np.hstack([region.groups_MD, -region.groups_MD]),
                change_row[:limited],
                np.hstack([region.rows_VD, -region.rows_VD]),
            ]
        )
        from_origin_D = region.prior_D - region.origin_D
        self.offset = np.concatenate(
            [
                region.groups_MD @ region.prior_D - region.group_least_M,
                [region.limit] if region.limit is not None else [],
                region.rows_VD @ from_origin_D + region.slack,
            ]
        )

    def mixture(self, moves: Array) -> Array:
        D = len(self.region.prior_D)
        weights_D: Array = self.region.prior_D + moves[:D] - moves[D:]
        return weights_D

    def values(self, moves: Array) -> Array:
        values: Array = self.rows @ moves + self.offset
        if self.region.errors_VD is not None:
            values[self.pareto_from :] -= self._noise(self.mixture(moves))[0] - _CONE_TIP
        return values

    def jacobian(self, moves: Array) -> Array:
        if self.region.errors_VD is None:
            return self.rows
        slope_VD = self._noise(self.mixture(moves))[1]
        rows = self.rows.copy()
        rows[self.pareto_from :] -= np.hstack([slope_VD, -slope_VD])
        return rows

    def _noise(self, weights_D: Array) -> tuple[Array, Array]:
        """‖e_i ∘ d‖ with the cone's tip cut off, (V,), and its gradient, (V, D)."""
        errors_VD = self.region.errors_VD
        assert errors_VD is not None
        noise_VD = errors_VD * (weights_D - self.region.origin_D)
        length_V = np.sqrt((noise_VD**2).sum(axis=1) + _CONE_TIP**2)
        return length_V, errors_VD * noise_VD / length_V[:, None]

    def as_dicts(self) -> Any:
        given: list[dict[str, Any]] = [
            {"type": "eq", "fun": lambda x: self.sum_row @ x, "jac": lambda x: self.sum_row},
        ]
        if len(self.rows):
            given.append({"type": "ineq", "fun": self.values, "jac": self.jacobian})
        return given

    def multipliers(self, weights_D: Array, std_V: Array, found: Array) -> Multipliers:
        """SLSQP's multipliers, `found`, in the order of :meth:`as_dicts`."""
        region = self.region
        M = len(region.groups_MD)
        groups_M, change, pareto_V = np.split(found[1:], [M, self.pareto_from])
        cones_VD = None
        if region.errors_VD is not None:
            noise_VD = region.errors_VD * (weights_D - region.origin_D)
            cones_VD = -pareto_V[:, None] * noise_VD / self._noise(weights_D)[0][:, None]
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
    # w ≤ 1 follows from w ≥ 0 and Σ w = 1: fewer bounds, faster.
    room_D = np.where(region.upper_D < 1, room_D, np.inf)
    most = np.concatenate([room_D, surplus_D]).clip(min=0)
    answer = minimize(
        value_and_gradient,
        _start(region).clip(least, most),
        jac=True,
        method="SLSQP",
        bounds=Bounds(least, most),
        constraints=constraints.as_dicts(),
        options={"ftol": 1e-13, "maxiter": 500},
    )
    weights_D = constraints.mixture(answer.x)
    std_V = objective.uniformity(objective.rows_VD @ weights_D, _SMOOTHING)[1]
    # Where the bounds leave a single mixture, SciPy returns it without either of these.
    no_multipliers = np.zeros(1 + len(constraints.rows))
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
