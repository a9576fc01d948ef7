"""How far a mixture can be from the optimum: a lower bound of L by Lagrange duality.

With multipliers for every constraint but the bounds and Σ w = 1, and with std(P̂) replaced by
zᵀP̂, z in its dual ball (Σ z = 0, Σ z²/u ≤ 1), and a logarithmic gain by its tangent at the mixture
in question, which lies above it, the Lagrangian is a sum of convex functions of one
weight each. Its minimum over {Σ w = 1, lower ≤ w ≤ upper} is found exactly, by a search for one
number, and lies below L(w) for every feasible w, *whatever* the multipliers: they come from a
solver, and nothing here has to believe it. At the optimum's multipliers the bound is tight.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from megatron_tikmix.solve.objective import Objective
from megatron_tikmix.solve.region import FEASIBLE, Region

Array = NDArray[np.float64]

OPTIMAL = 1e-6
"""Largest duality gap of a certified mixture, in units of L."""


@dataclass(frozen=True, eq=False)
class Multipliers:
    """Prices of the constraints, as a solver found them; made valid before use."""

    std_V: Array
    """z: a subgradient of std(P̂)."""

    groups_M: Array

    change: float
    """Price of the limit to the total variation."""

    pareto_V: Array

    cones_VD: Array | None = None
    """Prices of the vectors e_i ∘ d in Pareto's cones; None without cones."""


@dataclass(frozen=True)
class Certificate:
    """Proof that a mixture is feasible and optimal, as far as the numbers show."""

    lower_bound: float
    """No mixture within the constraints has a smaller L."""

    gap: float
    """L of the mixture less the lower bound, in units of L."""

    violation: float
    """Largest violation of a constraint, in weight or normalised influence."""

    @property
    def holds(self) -> bool:
        """Feasible to 1e-8, and optimal to 1e-6."""
        return self.violation <= FEASIBLE and self.gap <= OPTIMAL

    def __str__(self) -> str:
        return f"duality gap {self.gap:.2g}, constraints broken by {self.violation:.2g}"


def certify(
    objective: Objective, region: Region, weights_D: Array, multipliers: Multipliers
) -> Certificate:
    """The certificate of `weights_D`, (D,)."""
    bound = lower_bound(objective, region, multipliers, weights_D)
    violation, _ = region.violation(weights_D)
    return Certificate(bound, objective.value(weights_D) - bound, violation)


def lower_bound(
    objective: Objective, region: Region, multipliers: Multipliers, weights_D: Array
) -> float:
    """A value that L is not below anywhere in the region; `weights_D` may be any mixture."""
    linear_D, constant, change = _lagrangian(objective, region, multipliers, weights_D)
    return constant + _separable_minimum(
        linear_D,
        change,
        region.prior_D,
        region.lower_D,
        region.upper_D,
        objective.gamma,
        objective.log_reference_D,
    )


def _lagrangian(
    objective: Objective, region: Region, multipliers: Multipliers, weights_D: Array
) -> tuple[Array, float, float]:
    """c, constant and y of the Lagrangian c·w + γ·(…) + y·Σ max(w − prior, 0) + constant."""
    z_V = _in_std_ball(multipliers.std_V, objective.task_weights_V)
    at_V = objective.rows_VD @ weights_D
    gain, slope_V = objective.gain(at_V)
    linear_D = objective.rows_VD.T @ (objective.alpha * z_V - objective.beta * slope_V)
    constant, change = -objective.beta * (gain - float(slope_V @ at_V)), 0.0

    groups_M = multipliers.groups_M.clip(min=0)
    linear_D = linear_D - region.groups_MD.T @ groups_M
    constant += float(groups_M @ region.group_least_M)

    if region.limit is not None:
        change = max(multipliers.change, 0.0)
        constant -= change * region.limit

    if len(region.rows_VD):
        # y_i (r_i·d + slack) + v_i·(e_i ∘ d) ≥ 0 in the region for any ‖v_i‖ ≤ y_i.
        pareto_V = multipliers.pareto_V.clip(min=0)
        slope_D = region.rows_VD.T @ pareto_V
        if region.errors_VD is not None and multipliers.cones_VD is not None:
            length_V1 = np.linalg.norm(multipliers.cones_VD, axis=1, keepdims=True)
            shrink_V1 = np.minimum(1.0, pareto_V[:, None] / np.maximum(length_V1, 1e-300))
            slope_D = slope_D + (shrink_V1 * multipliers.cones_VD * region.errors_VD).sum(axis=0)
        linear_D = linear_D - slope_D
        constant += float(slope_D @ region.origin_D) - region.slack * float(pareto_V.sum())
    return linear_D, constant, change


def _in_std_ball(z_V: Array, task_weights_V: Array) -> Array:
    """The vector brought into {z: Σ z = 0, Σ z²/u ≤ 1, z = 0 where u = 0}."""
    kept_V = task_weights_V > 0
    z_V = np.where(kept_V, z_V - task_weights_V * z_V[kept_V].sum(), 0.0)
    norm = np.sqrt((z_V[kept_V] ** 2 / task_weights_V[kept_V]).sum())
    return z_V / max(1.0, float(norm))


def _separable_minimum(
    linear_D: Array,
    change: float,
    prior_D: Array,
    lower_D: Array,
    upper_D: Array,
    gamma: float,
    log_reference_D: Array | None,
) -> float:
    """min over Σ w = 1 and the bounds of Σ_j c_j w_j + γ w_j ln(w_j/ref_j) + y (w_j − prior_j)⁺.

    For any ν, Σ_j min_w (… + ν w_j) − ν bounds it from below; the best ν is where the minimising
    weights sum to 1.
    """
    log_reference_D = np.zeros_like(linear_D) if log_reference_D is None else log_reference_D

    def minimiser(nu: float) -> Array:
        slope_D = linear_D + nu  # of the linear part below the prior; above it, `change` more
        if gamma > 0:
            below_D = np.exp(np.minimum(log_reference_D - slope_D / gamma - 1, 700.0))
            above_D = np.exp(np.minimum(log_reference_D - (slope_D + change) / gamma - 1, 700.0))
        else:
            below_D = np.where(slope_D > 0, 0.0, np.inf)
            above_D = np.where(slope_D + change > 0, 0.0, np.inf)
        weights_D = np.where(below_D < prior_D, below_D, np.maximum(above_D, prior_D))
        return weights_D.clip(lower_D, upper_D)

    def value(nu: float) -> float:
        weights_D = minimiser(nu)
        positive_D = np.maximum(weights_D, 1e-300)
        entropy_D = weights_D * (np.log(positive_D) - log_reference_D)
        terms_D = linear_D * weights_D + gamma * entropy_D
        terms_D += change * np.maximum(weights_D - prior_D, 0)
        return float(terms_D.sum() + nu * (weights_D.sum() - 1))

    # At `far` every weight is at a bound, whichever sign it has.
    far = np.abs(linear_D).max() + change + gamma * (np.abs(log_reference_D).max() + 720)
    excess = [minimiser(nu).sum() - 1 for nu in (-far, far)]
    if excess[0] <= 0:
        return value(-far)
    if excess[1] >= 0:
        return value(far)
    nu = brentq(lambda nu: minimiser(nu).sum() - 1, -far, far, xtol=1e-15, rtol=1e-15, maxiter=500)
    step = 1e-14 * max(1.0, abs(nu))
    return max(value(nu - step), value(nu), value(nu + step))
