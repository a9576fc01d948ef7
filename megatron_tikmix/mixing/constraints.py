"""What a new mixture must respect, besides being a mixture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError

Array = NDArray[np.float64]
Bound = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class MixtureConstraints:
    """Limits on the mixture that a solver may return.

    Raises:
        InputError: `max_total_variation` is not in (0, 1].
    """

    lower: Bound = 0.0
    """Least weight: one for all domains, or by name (0 for domains not named)."""

    upper: Bound = 1.0
    """Largest weight: one for all domains, or by name (1 for domains not named)."""

    max_total_variation: float | None = 0.25
    """Largest change per reset, ½ Σ_j |w_j - prior_j|; None: no limit."""

    pareto: bool = True
    """No task may gain less than under the prior: S w ≥ S w_prior in every row."""

    def __post_init__(self) -> None:
        limit = self.max_total_variation
        if limit is not None and not 0 < limit <= 1:
            raise InputError(
                f"max_total_variation is {limit}; it must be above 0 and at most 1, "
                "or None for no limit"
            )

    def bounds(self, domains: Sequence[str]) -> tuple[Array, Array]:
        """Lower and upper bounds of the weights, float64 (D,) each.

        Raises:
            InputError: an unknown domain, a bound that is not a weight, or bounds that no
                mixture fits.
        """
        lower_D = _per_domain("lower", self.lower, domains, otherwise=0.0)
        upper_D = _per_domain("upper", self.upper, domains, otherwise=1.0)
        for d in np.flatnonzero(lower_D > upper_D)[:1]:
            raise InputError(
                f"lower: the bound {lower_D[d]} of domain {domains[d]} is above its upper bound "
                f"{upper_D[d]}"
            )
        if lower_D.sum() > 1 + 1e-12 or upper_D.sum() < 1 - 1e-12:
            raise InputError(
                f"lower, upper: the bounds sum to {lower_D.sum():.6g} and {upper_D.sum():.6g}; "
                "1 must lie between, for weights to sum to 1"
            )
        return lower_D, upper_D

    def slacks(
        self,
        weights_D: Array,
        prior_D: Array,
        rows_VD: Array,
        domains: Sequence[str],
        tasks: Sequence[str],
    ) -> dict[str, float]:
        """What is left of every constraint, by name; negative where it is broken.

        Bounds and total variation in weight, Pareto in the units of `rows_VD`.
        """
        lower_D, upper_D = self.bounds(domains)
        slacks = {f"lower:{name}": weights_D[d] - lower_D[d] for d, name in enumerate(domains)}
        slacks |= {f"upper:{name}": upper_D[d] - weights_D[d] for d, name in enumerate(domains)}
        if self.max_total_variation is not None:
            moved = 0.5 * np.abs(weights_D - prior_D).sum()
            slacks["total_variation"] = self.max_total_variation - moved
        if self.pareto:
            change_V = rows_VD @ (weights_D - prior_D)
            slacks |= {f"pareto:{name}": change_V[v] for v, name in enumerate(tasks)}
        return {name: float(slack) for name, slack in slacks.items()}


def _per_domain(field: str, bound: Bound, domains: Sequence[str], otherwise: float) -> Array:
    if not isinstance(bound, Mapping):
        bound = dict.fromkeys(domains, bound)
    for name, value in bound.items():
        if name not in domains:
            raise InputError(f"{field}: domain {name} is not in the mixture")
        if not math.isfinite(value) or not 0 <= value <= 1:
            raise InputError(f"{field}: the bound of domain {name} is {value}; give 0 to 1")
    return np.array([bound.get(name, otherwise) for name in domains], dtype=np.float64)
