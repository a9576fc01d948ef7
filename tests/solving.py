"""The solvers with the settings that most tests of them are about, by keyword."""

from typing import Any

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Goal
from megatron_tikmix.solve.solution import MixtureSolution
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d
from megatron_tikmix.solve.tikmix_m import solve_tikmix_m


def limited(**fields: Any) -> MixtureConstraints:
    """Constraints with a limit to the change, and Pareto: more to get wrong than without."""
    return MixtureConstraints(**{"max_total_variation": 0.25, "pareto": True, **fields})


def goal_of(
    *,
    preset: str | None = None,
    diversity_reference: Mixture | None = None,
    **fields: Any,
) -> Goal:
    """A goal whose gain is linear, and whose diversity is the entropy, unless said otherwise."""
    if preset not in (None, "paper"):
        Goal.of_preset(preset, Mixture({"any": 1.0}))
    return Goal(raw_sum=preset == "paper", reference=diversity_reference, **fields)


def solve_d(
    influence: InfluenceMatrix,
    prior: Mixture,
    constraints: MixtureConstraints | None = None,
    **goal: Any,
) -> MixtureSolution:
    """TiKMiX-D, within :func:`limited` unless other constraints are given."""
    return solve_tikmix_d(influence, prior, goal_of(**goal), constraints or limited())


def solve_m(
    influence: InfluenceMatrix,
    prior: Mixture,
    constraints: MixtureConstraints | None = None,
    *,
    goal: Goal | None = None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    **options: Any,
) -> MixtureSolution:
    """TiKMiX-M, likewise."""
    goal = goal or Goal(alpha=alpha, gamma=gamma)
    return solve_tikmix_m(influence, prior, goal, constraints or limited(), **options)
