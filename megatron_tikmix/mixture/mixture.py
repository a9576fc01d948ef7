"""Mixture: the sampling weights of the training domains."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError

WEIGHT_TOTAL = 2**30
"""The sum of the integer weights of a mixture."""


class Mixture(Mapping[str, float]):
    """Domain weights by token, with sum 1: an immutable, hashable mapping name -> weight.

    ``Mixture({"code": 3, "prose": 1})`` is normalised to sum 1; zero weights stay in. Two
    mixtures are equal when every domain has the same weight, whatever the order of the names.

    Raises:
        InputError: there is no domain, a name is no string, a weight is negative or not a finite
            number, or all weights are zero.
    """

    __slots__ = ("_weights",)

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not weights:
            raise InputError("mixture: no domain is named; give at least one domain and its weight")
        for name, weight in weights.items():
            if not isinstance(name, str):
                raise InputError(f"mixture: domain name {name!r} must be a string")
            if not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
                raise InputError(
                    f"mixture: the weight of domain {name} is {weight!r}; "
                    "it must be a finite number, zero or more"
                )
        try:
            total = math.fsum(weights.values())
        except OverflowError:
            total = math.inf
        if not 0 < total < math.inf:
            raise InputError(
                f"mixture: the weights sum to {total}; make it a finite number above 0"
            )
        # Weights that already sum to 1 keep their bits, so that a mixture read back from JSON
        # is the same mixture.
        if abs(total - 1.0) <= 4 * np.finfo(np.float64).eps:
            total = 1.0
        self._weights = {name: float(weight) / total for name, weight in weights.items()}

    @classmethod
    def uniform(cls, names: Iterable[str]) -> "Mixture":
        """Return the same weight for every name."""
        return cls(dict.fromkeys(names, 1.0))

    @classmethod
    def proportional(cls, tokens: Mapping[str, float]) -> "Mixture":
        """Return weights proportional to each domain's tokens."""
        return cls(tokens)

    @classmethod
    def from_integer_weights(cls, integer_weights: Mapping[str, int]) -> "Mixture":
        """Return the mixture with exactly these :meth:`integer_weights`.

        Each weight is an integer over 2³⁰, which a float holds exactly, also after JSON.

        Raises:
            InputError: a weight is no integer or negative, or they do not sum to 2³⁰.
        """
        for name, weight in integer_weights.items():
            if not isinstance(weight, Integral):
                raise InputError(f"mixture: the integer weight of domain {name} is {weight!r}")
        total = sum(int(weight) for weight in integer_weights.values())
        if total != WEIGHT_TOTAL:
            raise InputError(
                f"mixture: integer weights sum to {total} and not to {WEIGHT_TOTAL}; "
                "take them from Mixture.integer_weights()"
            )
        return cls({name: int(weight) / WEIGHT_TOTAL for name, weight in integer_weights.items()})

    @property
    def domains(self) -> list[str]:
        """Domain names, in the order given."""
        return list(self._weights)

    @property
    def effective_domains(self) -> float:
        """exp(entropy), natural logarithm: D for a uniform mixture of D domains, 1 for just one."""
        return math.exp(-math.fsum(w * math.log(w) for w in self.values() if w > 0))

    def array(self, domains: Sequence[str] | None = None) -> NDArray[np.float64]:
        """Return the weights as float64 (D,), in the order of `domains` (default: its own).

        Raises:
            InputError: `domains` are not the mixture's domains.
        """
        if domains is None:
            domains = self.domains
        different = sorted(set(domains) ^ set(self._weights))
        if different or len(domains) != len(self._weights):
            raise InputError(
                f"mixture: its domains must be those asked for; different: {different[:5]}"
            )
        return np.array([self._weights[name] for name in domains], dtype=np.float64)

    def integer_weights(self) -> dict[str, int]:
        """Return the nearest weights in units of 2⁻³⁰: integers ≥ 0 that sum to 2³⁰.

        The largest remainders are rounded up, equal ones in the order of the names, so the result
        does not depend on the order of the domains.
        """
        scaled = {name: weight * WEIGHT_TOTAL for name, weight in self.items()}  # exact
        integers = {name: math.floor(value) for name, value in scaled.items()}
        missing = WEIGHT_TOTAL - sum(integers.values())
        by_remainder = sorted(scaled, key=lambda name: (integers[name] - scaled[name], name))
        for name in by_remainder[:missing]:
            integers[name] += 1
        return integers

    def rounded(self) -> "Mixture":
        """Return the mixture of :meth:`integer_weights`; rounding twice changes nothing."""
        return self.from_integer_weights(self.integer_weights())

    def total_variation(self, other: "Mixture") -> float:
        """Return half the summed absolute differences of the weights, 0 to 1."""
        return 0.5 * math.fsum(np.abs(self.array() - other.array(self.domains)))

    def to_json(self) -> dict[str, float]:
        """Return the weights as a plain dict."""
        return dict(self._weights)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Mixture":
        """Undo :meth:`to_json`, to the last bit."""
        return cls(data)

    def __getitem__(self, name: str) -> float:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __hash__(self) -> int:
        return hash(frozenset(self._weights.items()))

    def __repr__(self) -> str:
        largest = sorted(self._weights, key=lambda name: -self._weights[name])
        shown = ", ".join(f"{name}: {self._weights[name]:.4g}" for name in largest[:12])
        rest = f", and {len(largest) - 12} smaller" if len(largest) > 12 else ""
        return f"Mixture({shown}{rest})"
