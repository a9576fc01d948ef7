"""The audit: does training really go where the influence matrix said it would?

Short rollouts of the old and of the new mixture, in pairs that share their random numbers,
repeated with fresh ones. What they realise is held against what was predicted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Verdict = Literal["confirmed", "inconclusive", "contradicted"]

LEAST_REPETITIONS = 4


@dataclass(frozen=True)
class RolloutOutcomes:
    """The measurements of rollouts, the same on every rank.

    Attributes:
        drops_RNV: each repetition's and candidate's drop of each task's loss, before − after, in
            nats per token, float64 (R, N, V). Positive: the task got better (the benefit sign).
            NaN for all tasks where a loss or a gradient of the rollout was not finite.
        before_V: the tasks' losses the drops start from, float64 (V,).
        trained_tokens: tokens of the optimizer steps, over all ranks.
        evaluated_tokens: tokens of the forward passes that measured losses, padding included.
        seconds: wall-clock time.
    """

    drops_RNV: NDArray[np.float64]
    before_V: NDArray[np.float64]
    trained_tokens: int
    evaluated_tokens: int
    seconds: float

    @property
    def outcomes_NV(self) -> NDArray[np.float64]:
        """The drops averaged over repetitions, float64 (N, V); NaN where one of them is."""
        return self.drops_RNV.mean(axis=0)


@dataclass
class RolloutCost:
    """The cost of all rollouts of a service so far, the same on every rank.

    Attributes:
        rollouts: candidates measured, each repetition counted.
        trained_tokens, evaluated_tokens, seconds: as in
            :class:`RolloutOutcomes`.
    """

    rollouts: int = 0
    trained_tokens: int = 0
    evaluated_tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RolloutCost":
        """Undo :meth:`to_json`."""
        return cls(**data)


@dataclass(frozen=True)
class Comparison:
    """A predicted against a realised difference, new mixture − old, in the benefit sign.

    Attributes:
        predicted: of influence, in the matrix's own unit: only its sign is compared.
        difference: of the loss drops, mean over repetitions, nats per token. Positive: the new
            mixture is better. NaN with fewer than two repetitions to go by.
        low, high: its t interval over repetitions.
        verdict: `inconclusive` while the interval contains 0 (or nothing was predicted),
            `confirmed` if it lies on the predicted side of 0, else `contradicted`.
    """

    predicted: float
    difference: float
    low: float
    high: float
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values; None for numbers that are not finite."""
        numbers = {
            "predicted": self.predicted,
            "difference": self.difference,
            "low": self.low,
            "high": self.high,
        }
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {**finite, "verdict": self.verdict}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Comparison":
        """Undo :meth:`to_json`; what is None is NaN."""
        numbers = ("predicted", "difference", "low", "high")
        found = {key: math.nan if data[key] is None else data[key] for key in numbers}
        return cls(verdict=data["verdict"], **found)


@dataclass(frozen=True)
class Audit:
    """The result of an audit, as the ledger holds it.

    Attributes:
        tasks: a comparison for each task, by name.
        overall: of the sum over tasks, weighted by what each counts for in the decision.
        iters: optimizer steps of each rollout.
        repetitions: pairs of rollouts.
        confidence: of the intervals.
        lost: repetitions in which the (old, new) mixture's rollout lost its loss or gradient;
            pairs with either are left out of the comparisons.
        trained_tokens, evaluated_tokens, seconds: what it cost.
    """

    tasks: Mapping[str, Comparison]
    overall: Comparison
    iters: int
    repetitions: int
    confidence: float
    lost: tuple[int, int]
    trained_tokens: int
    evaluated_tokens: int
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """The verdict on the weighted sum: of many single tasks, some are outside by chance.

        `contradicted` too when the new mixture lost its loss more often than the old one.
        """
        return "contradicted" if self.lost[1] > self.lost[0] else self.overall.verdict

    @property
    def refutes(self) -> bool:
        """True if the new mixture is worse than the old one, whatever was predicted."""
        return self.lost[1] > self.lost[0] or self.overall.high < 0

    @property
    def reason(self) -> str:
        """One sentence for the ledger and the terminal."""
        if self.lost[1] > self.lost[0]:
            return (
                f"the audit's rollouts of the new mixture lost their loss {self.lost[1]} times in "
                f"{self.repetitions}, those of the old one {self.lost[0]} times"
            )
        found = self.overall
        return (
            f"the audit's rollouts are {_WORDS[found.verdict]}: the new mixture's loss fell by "
            f"{found.difference:+.4f} nats against the old one's, {self.confidence:.0%} interval "
            f"{found.low:+.4f} to {found.high:+.4f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values, for a row of the ledger."""
        return {
            "verdict": self.verdict,
            "refutes": self.refutes,
            "reason": self.reason,
            "overall": self.overall.to_json(),
            "tasks": {name: found.to_json() for name, found in self.tasks.items()},
            "iters": self.iters,
            "repetitions": self.repetitions,
            "confidence": self.confidence,
            "lost": list(self.lost),
            "trained_tokens": self.trained_tokens,
            "evaluated_tokens": self.evaluated_tokens,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Audit":
        """Undo :meth:`to_json`."""
        derived = ("verdict", "refutes", "reason")
        return cls(
            **{
                **{name: value for name, value in data.items() if name not in derived},
                "tasks": {
                    name: Comparison.from_json(found) for name, found in data["tasks"].items()
                },
                "overall": Comparison.from_json(data["overall"]),
                "lost": (data["lost"][0], data["lost"][1]),
            }
        )


_WORDS: dict[Verdict, str] = {
    "confirmed": "as predicted",
    "inconclusive": "inconclusive",
    "contradicted": "against the prediction",
}


def compare(predicted: float, realised_R: ArrayLike, confidence: float = 0.95) -> Comparison:
    """A prediction against repeated paired differences, by Student's t.

    Args:
        predicted: difference of influence, new − old, benefit sign.
        realised_R: difference of loss drops of each repetition, the same way round, float (R,);
            those not finite are left out.
    """
    given_R = np.asarray(realised_R, dtype=np.float64)
    kept_R = given_R[np.isfinite(given_R)]
    n = len(kept_R)
    if n < 2:
        return Comparison(predicted, math.nan, math.nan, math.nan, "inconclusive")
    mean = float(kept_R.mean())
    low, high = mean, mean
    if np.ptp(kept_R) > 0:
        interval = stats.ttest_1samp(kept_R, 0).confidence_interval(confidence)
        low, high = float(interval.low), float(interval.high)
    verdict: Verdict = "inconclusive"
    if predicted != 0 and (low > 0 or high < 0):
        verdict = "confirmed" if (low > 0) == (predicted > 0) else "contradicted"
    return Comparison(predicted, mean, low, high, verdict)


def judge(
    tasks: Sequence[str],
    task_weights: Mapping[str, float],
    predicted_V: ArrayLike,
    outcomes: RolloutOutcomes,
    *,
    iters: int,
    confidence: float = 0.95,
) -> Audit:
    """The audit of rollouts that were already run.

    Args:
        tasks: names, in the order of the arrays.
        predicted_V: S·(w_new − w_old), benefit sign, float (V,).
        outcomes: of the candidates old, new, in this order.
    """
    influence_V = np.asarray(predicted_V, dtype=np.float64)
    old_RV, new_RV = outcomes.drops_RNV[:, 0], outcomes.drops_RNV[:, 1]
    lost_old_R, lost_new_R = (~np.isfinite(drops_RV).all(axis=1) for drops_RV in (old_RV, new_RV))
    realised_RV = (new_RV - old_RV)[~(lost_old_R | lost_new_R)]
    weights_V = np.array([task_weights[name] for name in tasks], dtype=np.float64)
    weights_V /= weights_V.sum()
    return Audit(
        tasks={
            name: compare(float(influence_V[i]), realised_RV[:, i], confidence)
            for i, name in enumerate(tasks)
        },
        overall=compare(float(weights_V @ influence_V), realised_RV @ weights_V, confidence),
        iters=iters,
        repetitions=len(old_RV),
        confidence=confidence,
        lost=(int(lost_old_R.sum()), int(lost_new_R.sum())),
        trained_tokens=outcomes.trained_tokens,
        evaluated_tokens=outcomes.evaluated_tokens,
        seconds=outcomes.seconds,
    )
