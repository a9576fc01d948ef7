"""What a new mixture must respect, besides being a mixture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError

Array = NDArray[np.float64]
Bound = float | Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class DomainGroup:
    """Domains whose summed weight has bounds of its own ("all code", "all of one language").

    Raises:
        InputError: no domain, a domain named twice, or bounds that are not 0 ≤ lower ≤ upper ≤ 1.
    """

    domains: Sequence[str]
    """The members; a domain may be in several groups."""

    lower: float = 0.0
    """Least summed weight."""

    upper: float = 1.0
    """Largest summed weight."""

    def __post_init__(self) -> None:
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise InputError(f"groups: a group must name domains, each once; got {self.domains}")
        if not 0 <= self.lower <= self.upper <= 1:  # also false for NaN
            raise InputError(
                f"groups: the bounds of {list(self.domains)} are {self.lower} and {self.upper}; "
                "they must be 0 ≤ lower ≤ upper ≤ 1"
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConstraints:
    """Limits on the mixture that a solver may return.

    Bounds, groups, fixed domains and epoch caps are *hard*: they always hold in the answer. The
    largest change and Pareto are relative to the mixture in force, and give way, aloud, where
    that mixture breaks a hard constraint and cannot be mended otherwise.

    Raises:
        InputError: a number is out of its range.
    """

    lower: Bound = 0.0
    """Least weight: one for all domains, or by name (0 for domains not named)."""

    upper: Bound = 1.0
    """Largest weight: one for all domains, or by name (1 for domains not named)."""

    epoch_caps: Mapping[str, float] = field(default_factory=dict)
    """Largest weight, by name, that keeps a domain within its `max_epochs`; of
    :func:`epoch_caps`. Values above 1 are no limit."""

    fixed: Sequence[str] | Mapping[str, float] = ()
    """Domains whose weight is not to be decided: names (they keep the weight that they have in
    the mixture in force), or the weight by name."""

    groups: Mapping[str, DomainGroup] = field(default_factory=dict)
    """Bounds on summed weights, by the group's name."""

    max_total_variation: float | None = None
    """Largest change per reset, ½ Σ_j |w_j - prior_j|; None: no limit."""

    pareto: bool = False
    """No task may gain less than under the prior: S w ≥ S w_prior in every row; as the paper has
    it."""

    pareto_slack: float = 0.0
    """How much less than under the prior a task may gain, in units of its row's largest
    |influence|."""

    confidence: float | None = None
    """With standard errors of the influence: the probability, 0.5 to 1, with which Pareto is to
    hold for the *true* influence of all tasks at once (a second-order cone per task in place of
    its linear row); None: for the influence as measured, errors ignored."""

    def __post_init__(self) -> None:
        limit, confidence = self.max_total_variation, self.confidence
        if limit is not None and not 0 < limit <= 1:
            raise InputError(
                f"max_total_variation is {limit}; it must be above 0 and at most 1, "
                "or None for no limit"
            )
        if not 0 <= self.pareto_slack < math.inf:
            raise InputError(f"pareto_slack is {self.pareto_slack}; it must be zero or more")
        if confidence is not None and not self.pareto:
            raise InputError("confidence is about Pareto: set pareto true, or leave it out")
        if confidence is not None and not 0.5 <= confidence < 1:
            raise InputError(
                f"confidence is {confidence}; it must be from 0.5 to below 1, or None to take the "
                "influence as exact"
            )

    def bounds(self, domains: Sequence[str]) -> tuple[Array, Array]:
        """`lower` and `upper` as float64 (D,) each.

        Raises:
            InputError: an unknown domain, or a bound that is not a weight.
        """
        return (
            _per_domain("lower", self.lower, domains, otherwise=0.0),
            _per_domain("upper", self.upper, domains, otherwise=1.0),
        )

    def caps(self, domains: Sequence[str]) -> Array:
        """`epoch_caps` as float64 (D,), 1 where there is none.

        Raises:
            InputError: an unknown domain, or a negative cap.
        """
        caps = {name: min(cap, 1.0) for name, cap in self.epoch_caps.items()}
        return _per_domain("epoch_caps", caps, domains, otherwise=1.0)

    def fixed_weights(self, domains: Sequence[str], prior_D: Array) -> Array:
        """`fixed` as float64 (D,), NaN where the weight is free.

        Raises:
            InputError: an unknown domain, or a weight that is none.
        """
        fixed = self.fixed
        if not isinstance(fixed, Mapping):
            if isinstance(fixed, str):
                raise InputError(f"fixed: {fixed!r} must be a list of domains, or weights by name")
            prior = dict(zip(domains, prior_D.tolist(), strict=True))
            fixed = {name: prior.get(name, 0.0) for name in fixed}
        return _per_domain("fixed", fixed, domains, otherwise=math.nan)


def epoch_caps(
    domain_tokens: Mapping[str, float],
    consumed_tokens: Mapping[str, float],
    interval_tokens: float,
    max_epochs: float | Mapping[str, float],
) -> dict[str, float]:
    """The largest weight of each domain that keeps it within `max_epochs` during an interval.

    A domain of n tokens of which c were drawn may still give max_epochs·n − c, and with weight
    w it gives w · interval_tokens.

    Args:
        domain_tokens: tokens (or samples) of one epoch of each domain.
        consumed_tokens: those drawn since the run began, in the same unit.
        interval_tokens: those that the next interval draws from all domains.
        max_epochs: one for all domains, or by name (domains not named have no cap).

    Returns:
        caps by domain, 0 or more; for ``MixtureConstraints(epoch_caps=...)``.

    Raises:
        InputError: an unknown domain, or a number that is not positive.
    """
    if not interval_tokens > 0:
        raise InputError(f"epoch_caps: interval_tokens is {interval_tokens}; it must be positive")
    if not isinstance(max_epochs, Mapping):
        max_epochs = dict.fromkeys(domain_tokens, max_epochs)
    caps = {}
    for name, epochs in max_epochs.items():
        if name not in domain_tokens:
            raise InputError(f"max_epochs: domain {name} is not in the mixture")
        if not epochs > 0:
            raise InputError(f"max_epochs: of domain {name} is {epochs}; it must be above 0")
        left = epochs * domain_tokens[name] - consumed_tokens[name]
        caps[name] = max(left, 0.0) / interval_tokens
    return caps


def _per_domain(field: str, bound: Bound, domains: Sequence[str], otherwise: float) -> Array:
    if not isinstance(bound, Mapping):
        bound = dict.fromkeys(domains, bound)
    known = set(domains)
    for name, value in bound.items():
        if name not in known:
            raise InputError(f"{field}: domain {name} is not in the mixture")
        if not math.isfinite(value) or not 0 <= value <= 1:
            raise InputError(f"{field}: the bound of domain {name} is {value}; give 0 to 1")
    return np.array([bound.get(name, otherwise) for name in domains], dtype=np.float64)
