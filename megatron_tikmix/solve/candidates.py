"""Candidate mixtures around a given one: bounded Latin hypercube, and a sampler for many domains.

    box       l_j = least · c_j ≤ w_j ≤ h_j = most · c_j,  c the centre      (method.md, section 3)
    slice     {Σ w = 1} ∩ box: what a candidate must lie in

A Latin hypercube sample of the box is normalised, and rejected unless every weight is back inside
its interval. With hundreds of domains that happens never; then a sampler that never leaves the
slice gives the rest.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats.qmc import LatinHypercube

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.region import FEASIBLE, Region, region_of

Array = NDArray[np.float64]

_HYPERCUBES = 20  # drawn, at most, before the slice sampler takes over
_SWEEPS = 64  # of the slice sampler, from the centre; each gives every weight a new value
_TIGHT = 1e-9  # slack below this counts as none
_ROUNDING = 1e-12


def propose_candidates(
    centre: Mixture,
    count: int,
    *,
    scales: tuple[float, float] = (0.5, 2.0),
    constraints: MixtureConstraints | None = None,
    prior: Mixture | None = None,
    seed: int = 0,
) -> Array:
    """`count` mixtures around `centre`, float64 (N, D) in the order of its domains.

    Each weight lies between `scales` times the centre's. A domain of weight 0 stays at 0: raise it
    in the centre if it is to be tried. Constraints but Pareto (a matter of outcomes) are kept by
    pulling what breaks them towards a mixture well within them; so pulled, a candidate can leave
    the box. All mixtures are different, unless box and constraints leave no room, or the centre
    is at the limit of the largest change from a prior that is itself not allowed.

    Args:
        constraints: default: none.
        prior: the mixture in force, from which the largest change is measured; default: the
            centre.

    Raises:
        InputError: a count below 1, scales that are not 0 ≤ least ≤ 1 ≤ most, or a centre that
            breaks the constraints.
    """
    if count < 1:
        raise InputError(f"candidates: their count is {count}; it must be 1 or more")
    if constraints is None:
        constraints = MixtureConstraints(max_total_variation=None)
    domains, centre_D = centre.domains, centre.array()
    prior_D = centre_D if prior is None else prior.array(domains)
    no_rows_VD = np.empty((0, len(domains)))
    without_pareto = replace(constraints, pareto=False)
    region = region_of(without_pareto, domains, [], prior_D, no_rows_VD)
    broken, name = region.violation(centre_D)
    if broken > FEASIBLE:
        raise InputError(f"candidates: the centre breaks the constraint {name} by {broken:.3g}")
    prior_is_allowed = region.violation(prior_D)[0] <= FEASIBLE
    well_inside_D = (centre_D + prior_D) / 2 if prior_is_allowed else centre_D
    box = box_around(centre_D, region, scales)
    return pulled_inside(sample_box(box, centre_D, count, seed), well_inside_D, region)


def box_around(
    centre_D: Array, region: Region, scales: tuple[float, float], also_D: Array | None = None
) -> Region:
    """The region, its bounds narrowed to `scales` times the weights of the centre, which it holds;
    stretched to hold `also_D`, if given.

    Raises:
        InputError: scales that are not 0 ≤ least ≤ 1 ≤ most.
    """
    least, most = scales
    if not 0 <= least <= 1 <= most < np.inf:
        raise InputError(
            f"candidates: scales are {least} and {most}; they must be 0 ≤ least ≤ 1 ≤ most"
        )
    if also_D is None:
        also_D = centre_D
    # A bound may be broken by rounding: what must be held decides.
    held_2D = np.stack([centre_D, also_D])
    lower_D = np.minimum(least * centre_D, also_D)
    upper_D = np.maximum(most * centre_D, also_D)
    return replace(
        region,
        lower_D=np.minimum(np.maximum(lower_D, region.lower_D), held_2D.min(axis=0)),
        upper_D=np.maximum(np.minimum(upper_D, region.upper_D), held_2D.max(axis=0)),
    )


def sample_box(box: Region, centre_D: Array, count: int, seed: int) -> Array:
    """`count` mixtures within the bounds of `box`, which hold the centre, (N, D)."""
    rng = np.random.Generator(np.random.Philox(seed))
    found_ND = _latin_hypercube(box.lower_D, box.upper_D, count, rng)
    missing = count - len(found_ND)
    more_ND = slice_sample(box.lower_D, box.upper_D, centre_D, missing, rng)
    return np.vstack([found_ND, more_ND])


def _latin_hypercube(lower_D: Array, upper_D: Array, count: int, rng: np.random.Generator) -> Array:
    """Up to `count` samples of the box that normalising leaves in it, (N, D)."""
    accepted: list[Array] = [np.empty((0, len(lower_D)))]
    free_D = upper_D > lower_D
    if free_D.sum() < 2:
        return accepted[0]
    for _ in range(_HYPERCUBES):
        sample_ND = np.tile(lower_D, (count, 1))
        unit = LatinHypercube(int(free_D.sum()), rng=rng).random(count)
        sample_ND[:, free_D] += unit * (upper_D - lower_D)[free_D]
        sample_ND /= sample_ND.sum(axis=1, keepdims=True)
        inside_N = ((sample_ND >= lower_D) & (sample_ND <= upper_D)).all(axis=1)
        accepted.append(sample_ND[inside_N])
        if sum(map(len, accepted)) >= count:
            break
    return np.vstack(accepted)[:count]


def slice_sample(
    lower_D: Array, upper_D: Array, start_D: Array, count: int, rng: np.random.Generator
) -> Array:
    """`count` mixtures, evenly distributed over {Σ w = 1, lower ≤ w ≤ upper}, (N, D).

    Hit-and-run along pairs: the domains are paired at random, and every pair divides its summed
    weight anew, evenly over what the bounds allow. That keeps the sum and the bounds, and leaves
    the even distribution as it is. One chain a mixture, from `start_D`.
    """
    weights_ND = np.tile(start_D, (count, 1))
    half = len(start_D) // 2
    for _ in range(_SWEEPS):
        order_ND = rng.permuted(np.tile(np.arange(len(start_D)), (count, 1)), axis=1)
        first, second = order_ND[:, :half], order_ND[:, half : 2 * half]
        one = np.take_along_axis(weights_ND, first, axis=1)
        both = one + np.take_along_axis(weights_ND, second, axis=1)
        least = np.maximum(lower_D[first], both - upper_D[second])
        most = np.minimum(upper_D[first], both - lower_D[second])
        one = least + rng.random((count, half)) * (most - least).clip(min=0)
        np.put_along_axis(weights_ND, first, one, axis=1)
        np.put_along_axis(weights_ND, second, both - one, axis=1)
    return weights_ND.clip(lower_D, upper_D)  # rounding only


def pulled_inside(weights_ND: Array, inside_D: Array, region: Region) -> Array:
    """Each mixture, clipped to the bounds and, if it breaks another constraint but Pareto, moved
    towards `inside_D` until it keeps them all, (N, D).

    The slack of every constraint is concave in w, so it falls no faster than a straight line from
    its value at `inside_D`. A bound that `inside_D` meets with equality, on a domain or a group,
    leaves no room to move: a mixture that breaks a group's is first projected on all of them.
    """
    weights_ND = _within_bounds(weights_ND, region.lower_D, region.upper_D)
    slack_M = region.groups_MD @ inside_D - region.group_least_M
    tight_MD = region.groups_MD[slack_M <= _TIGHT]
    broken_N = ((weights_ND - inside_D) @ tight_MD.T < -_ROUNDING).any(axis=1)
    if broken_N.any():
        room_D = np.minimum(inside_D - region.lower_D, region.upper_D - inside_D)
        free_D = room_D > _TIGHT
        rows = np.vstack([tight_MD, np.ones(len(inside_D))]) * free_D
        move_ND = (weights_ND[broken_N] - inside_D) * free_D
        move_ND -= move_ND @ rows.T @ np.linalg.pinv(rows @ rows.T) @ rows
        weights_ND = weights_ND.copy()
        weights_ND[broken_N] = inside_D + move_ND
    slack_K = _slacks(inside_D[None], region)[0].clip(min=0)
    slack_NK = _slacks(weights_ND, region)
    broken_NK = slack_NK < -_ROUNDING
    share_NK = np.where(broken_NK, slack_K / np.where(broken_NK, slack_K - slack_NK, 1.0), 1.0)
    return inside_D + share_NK.min(axis=1, keepdims=True) * (weights_ND - inside_D)


def _within_bounds(weights_ND: Array, lower_D: Array, upper_D: Array) -> Array:
    """The mixtures clipped, what that adds or takes being spread over the room that is left."""
    clipped_ND = weights_ND.clip(lower_D, upper_D)
    missing_N1 = 1 - clipped_ND.sum(axis=1, keepdims=True)
    missing_N1[np.abs(missing_N1) <= _ROUNDING] = 0
    room_ND = np.where(missing_N1 > 0, upper_D - clipped_ND, clipped_ND - lower_D)
    total_N1 = room_ND.sum(axis=1, keepdims=True)
    return clipped_ND + missing_N1 * room_ND / np.where(total_N1 > 0, total_N1, 1.0)


def _slacks(weights_ND: Array, region: Region) -> Array:
    """Return the slack of every constraint but Pareto: bounds, groups, largest change, (N, K)."""
    parts: Sequence[Array] = [
        weights_ND - region.lower_D,
        region.upper_D - weights_ND,
        weights_ND @ region.groups_MD.T - region.group_least_M,
    ]
    if region.limit is not None:
        moved_N1 = 0.5 * np.abs(weights_ND - region.prior_D).sum(axis=1, keepdims=True)
        parts = [*parts, region.limit - moved_N1]
    return np.hstack(parts)
