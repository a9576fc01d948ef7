"""The objective of TiKMiX (paper, section 3.3): a goal in names, and its function on arrays.

A :class:`Goal` is all that a solver minimises, as plain values that a ledger can keep. With an
influence matrix it becomes an :class:`Objective`, a convex function of the weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture

Array = NDArray[np.float64]

V_REF = 4.0
"""The gain of this many tasks weighs against the entropy, however many tasks there are."""

LOG_FLOOR = 0.05
"""Below it the logarithmic gain goes on as its tangent: a task of no influence has a price, and not
an infinite one."""

Gain = Literal["linear", "log"]

Preset = Literal["default", "paper"]
"""`paper`: as published. `default`: what a run does unless it is configured otherwise."""

LEAST_REFERENCE = 1e-4
"""The least share of the uniform weight that a domain counts for in :func:`floored`."""

_TINY = 1e-12  # weights below it get a straight line instead of −w·ln w, whose slope is infinite
_ROUNDING = 1e-15  # a std below so much of the gains is 0, with a direction made of rounding


@dataclass(frozen=True, eq=False)
class Objective:
    """L(w) = α·std(P̂) − β·gain(P̂) − γ·diversity(w), to be minimised; convex in w.

        P̂_V = rows_VD w_D                 influence gained per task, in normalised rows
        std  = sqrt(Σ_i u_i (P̂_i − m)²)   m = Σ_i u_i P̂_i; population standard deviation
        gain = gain_scale · Σ_i u_i P̂_i      linear, as the paper has it; or
               gain_scale · Σ_i u_i ℓ(P̂_i)   log: ℓ(x) = 1 + ln x, and its tangent at 0.05 below
        diversity = H(w) = −Σ_j w_j ln w_j, or with a reference −KL(w ‖ reference)

    Losses fall with the logarithm of the tokens that serve them, about: what a task has much of
    already is worth less to it. ℓ is that, with value and slope of the linear gain at P̂ = 1, where
    the mixture is the best domain for the task and nothing else. So a task that gains little pulls
    harder, and nothing else is needed to keep the mixture from one domain.

    The parts in P̂ take P̂ itself, float64 (V,), so that they hold for any way to predict it.
    Make one with :meth:`of`.

    Whoever changes a term changes `solve/conic.py` too, which writes the same terms as cones, and,
    for diversity, `decision/explain.py`, which takes a change of weight apart by its logarithm.
    """

    rows_VD: Array
    """Normalised influence S_ij / n_i, n_i = max_j |S_ij|; zero where n_i = 0."""

    task_weights_V: Array
    """u_i: sum to 1 over the rows that are not zero, 0 for the others, which drop out."""

    gain_scale: float
    """V_REF; the number of rows that are not zero with the preset `paper` (the raw sum)."""

    alpha: float
    beta: float
    gamma: float

    gain_kind: Gain = "linear"

    log_reference_D: Array | None = None
    """ln of the reference mixture (0 where that is 0: there w must be 0); None: entropy."""

    @classmethod
    def of(
        cls,
        influence_VD: Array,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 1.0,
        task_weights_V: Array | None = None,
        preset: Literal["paper"] | None = None,
        gain: Gain = "linear",
        reference_D: Array | None = None,
    ) -> "Objective":
        """The objective for an influence matrix (V, D) in the benefit sign, of any row scale.

        `task_weights_V` (default: equal) need not sum to 1. `reference_D` is a mixture.
        """
        largest_V1 = np.abs(influence_VD).max(axis=1, keepdims=True)
        kept_V = largest_V1[:, 0] > 0
        weights_V = np.where(kept_V, 1.0 if task_weights_V is None else task_weights_V, 0.0)
        return cls(
            rows_VD=influence_VD / np.where(largest_V1 > 0, largest_V1, 1.0),
            task_weights_V=weights_V / (weights_V.sum() or 1.0),
            gain_scale=float(kept_V.sum()) if preset == "paper" else V_REF,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            gain_kind=gain,
            log_reference_D=(
                None if reference_D is None else np.log(np.where(reference_D > 0, reference_D, 1.0))
            ),
        )

    def uniformity(self, gains_V: Array, smoothing: float = 0.0) -> tuple[float, Array]:
        """std(P̂) and its gradient (V,).

        std has a kink at 0. There the gradient is 0, which is a subgradient: std is least there.
        A solver needs more: with `smoothing` = ε, std below ε becomes the parabola
        (std²/ε + ε)/2. It joins with the same slope, is convex, too high by at most ε/2, and its
        gradient (P̂ − m)·u/ε runs through the subgradients of the kink.
        """
        centred_V = gains_V - self.task_weights_V @ gains_V
        std = float(np.sqrt(self.task_weights_V @ centred_V**2))
        if std < smoothing:
            value = (std * std / smoothing + smoothing) / 2
            return value, self.task_weights_V * centred_V / smoothing
        if std <= _ROUNDING * np.abs(gains_V).max():
            return std, np.zeros_like(gains_V)
        return std, self.task_weights_V * centred_V / std

    def gain(self, gains_V: Array) -> tuple[float, Array]:
        """The gain and its gradient (V,)."""
        scale_V = self.gain_scale * self.task_weights_V
        if self.gain_kind == "linear":
            return float(scale_V @ gains_V), scale_V
        above_V = np.maximum(gains_V, LOG_FLOOR)
        values_V = 1 + np.log(above_V) + (gains_V - above_V) / LOG_FLOOR
        return float(scale_V @ values_V), scale_V / above_V

    def diversity(self, weights_D: Array) -> tuple[float, Array]:
        """Entropy of the mixture, natural log, or −KL to the reference; and its gradient (D,).

        Below 1e-12 a weight's −w·ln w goes on as a straight line: the value is off by at most
        1e-12, and the slope at 0 stays finite.
        """
        log_D = np.log(np.maximum(weights_D, _TINY))
        terms_D = np.where(weights_D > _TINY, -weights_D * log_D, _TINY - weights_D * (log_D + 1))
        value, gradient_D = float(terms_D.sum()), -(log_D + 1)
        if self.log_reference_D is None:
            return value, gradient_D
        return value + float(weights_D @ self.log_reference_D), gradient_D + self.log_reference_D

    def value(self, weights_D: Array) -> float:
        """L(w)."""
        return self.value_and_gradient(weights_D)[0]

    def combined(self, uniformity: float, gain: float, diversity: float) -> float:
        """L of its three terms."""
        return self.alpha * uniformity - self.beta * gain - self.gamma * diversity

    def value_and_gradient(self, weights_D: Array, smoothing: float = 0.0) -> tuple[float, Array]:
        """L(w) and its gradient (D,); `smoothing` as in :meth:`uniformity`."""
        gains_V = self.rows_VD @ weights_D
        uniformity, uniformity_V = self.uniformity(gains_V, smoothing)
        gain, gain_V = self.gain(gains_V)
        diversity, diversity_D = self.diversity(weights_D)
        value = self.combined(uniformity, gain, diversity)
        gradient_V = self.alpha * uniformity_V - self.beta * gain_V
        return value, self.rows_VD.T @ gradient_V - self.gamma * diversity_D


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a solver minimises: L(w) = α·std(P̂) − β·gain(P̂) − γ·diversity(w); see
    :class:`Objective` for its terms.

    Raises:
        InputError: a weight that is negative or not finite, an unknown gain, or a raw sum that is
            to be weighted or logarithmic.
    """

    alpha: float = 1.0
    """Weight of uniformity over tasks, std(P̂)."""

    beta: float = 1.0
    """Weight of the gain."""

    gamma: float = 1.0
    """Weight of the mixture's diversity."""

    gain: Gain = "linear"
    """How a task's gain counts: as it is, or by its logarithm, since gains saturate."""

    raw_sum: bool = False
    """Sum the gain over tasks, as the paper has it, so that more tasks outweigh the diversity."""

    task_weights: Mapping[str, float] | None = None
    """What each task counts for, by name; need not sum to 1. None: all the same."""

    reference: Mixture | None = None
    """The mixture that diversity, −KL(w ‖ reference), is measured from; a domain of weight 0 in
    it gets 0. None: the uniform mixture, so that diversity is the entropy of w."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise InputError(f"{name} is {value}; it must be a finite number, zero or more")
        if self.gain not in get_args(Gain):
            raise InputError(
                f"gain is {self.gain!r}; it must be one of {', '.join(get_args(Gain))}"
            )
        if self.raw_sum and self.gain != "linear":
            raise InputError("gain: the raw sum over tasks (preset 'paper') is linear")
        if self.raw_sum and self.task_weights is not None:
            raise InputError("task_weights: the raw sum over tasks (preset 'paper') has none")
        weights = [] if self.task_weights is None else list(self.task_weights.values())
        positive = all(math.isfinite(weight) and weight >= 0 for weight in weights)
        if not positive or (self.task_weights is not None and not any(weights)):
            raise InputError(
                "task_weights: each must be a finite number, zero or more, and one above zero"
            )

    @classmethod
    def of_preset(cls, preset: Preset, prior: Mixture, **changes: Any) -> "Goal":
        """Return the goal of a preset at a boundary where `prior` is the mixture in force.

        Args:
            changes: fields that are to differ from the preset's.

        Raises:
            InputError: an unknown preset, or as for the class.
        """
        if preset == "paper":
            return cls(**{"raw_sum": True, **changes})
        if preset == "default":
            return cls(**{"gain": "log", "reference": floored(prior), **changes})
        raise InputError(f"preset is {preset!r}; it must be one of {', '.join(get_args(Preset))}")

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        reference, weights = self.reference, self.task_weights
        return {
            **vars(self),
            "task_weights": None if weights is None else dict(weights),
            "reference": None if reference is None else reference.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Goal":
        """Undo :meth:`to_json`, to the last bit."""
        reference = data["reference"]
        return cls(
            **{**data, "reference": None if reference is None else Mixture.from_json(reference)}
        )

    def objective(self, influence: InfluenceMatrix) -> "Objective":
        """Return L as a function of weights in the order of the matrix's domains.

        Raises:
            InputError: the matrix has other tasks or domains than the goal.
        """
        weights_V = None
        if self.task_weights is not None:
            if set(self.task_weights) != set(influence.tasks):
                raise InputError(
                    f"task_weights: they name {sorted(self.task_weights)}; the influence matrix "
                    f"has {sorted(influence.tasks)}"
                )
            weights_V = np.array([self.task_weights[task] for task in influence.tasks], np.float64)
        return Objective.of(
            influence.values_VD,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            task_weights_V=weights_V,
            preset="paper" if self.raw_sum else None,
            gain=self.gain,
            reference_D=None if self.reference is None else self.reference.array(influence.domains),
        )


def floored(prior: Mixture) -> Mixture:
    """Return the mixture in force as a reference of diversity, with a floor under each weight.

    Where the reference is 0 the answer is 0: without a floor, a domain that was left out once
    would be left out for ever, however much it has come to help.
    """
    weights_D = np.maximum(prior.array(), LEAST_REFERENCE / len(prior))
    return Mixture(dict(zip(prior, (weights_D / weights_D.sum()).tolist(), strict=True)))
