"""From outcomes to figures: paired differences with intervals, gap closed, tokens saved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

from claims.policies import Outcome
from claims.runs import Result

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% t interval; no interval with one seed."""

    mean: float
    half_width: float

    @classmethod
    def of(cls, values_S: Array) -> "Interval":
        S = len(values_S)
        if S < 2:
            return cls(float(values_S.mean()), float("nan"))
        error = values_S.std(ddof=1) / np.sqrt(S)
        return cls(float(values_S.mean()), float(t.ppf(0.975, S - 1) * error))

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def text(self, scale: float = 1.0, digits: int = 3, sign: bool = False) -> str:
        mean = f"{scale * self.mean:{'+' if sign else ''}.{digits}f}"
        if np.isnan(self.half_width):
            return mean
        return f"{mean} ± {scale * self.half_width:.{digits}f}"


def losses(runs: Sequence[Result], tasks: Sequence[str]) -> Array:
    """Mean loss over the tasks at the end, by seed; (S,), nats per token."""
    return np.array([np.mean([run["task_loss"][task] for task in tasks]) for run in runs])


def by_name(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    return {outcome.policy.name: outcome for outcome in outcomes}


def gap_closed(
    runs: Sequence[Result], uniform: Sequence[Result], best: Sequence[Result], tasks: Sequence[str]
) -> Interval:
    """(uniform − policy) / (uniform − best static), paired by seed; the denominator is its mean,
    so that one seed's small gap does not blow up."""
    base_S = losses(uniform, tasks)
    gap = float((base_S - losses(best, tasks)).mean())
    return Interval.of((base_S - losses(runs, tasks)) / gap)


def difference(
    runs: Sequence[Result], reference: Sequence[Result], tasks: Sequence[str]
) -> Interval:
    """Loss of the runs less that of the reference, paired by seed; negative is better."""
    return Interval.of(losses(runs, tasks) - losses(reference, tasks))


def tokens_to_reach(
    runs: Sequence[Result], uniform: Sequence[Result], tasks: Sequence[str]
) -> Interval | None:
    """Share of a run's tokens after which the loss is uniform's at the end, paired by seed.

    Interpolated between evaluations. None if a seed does not get there.
    """
    shares = []
    for run, reference in zip(runs, uniform, strict=True):
        goal = np.mean([reference["task_loss"][task] for task in tasks])
        tokens = [point[0] for point in run["curve"]]
        means = [np.mean([point[1][task] for task in tasks]) for point in run["curve"]]
        below = np.flatnonzero(np.array(means) <= goal)
        if not len(below):
            return None
        last = int(below[0])
        if last == 0:
            shares.append(tokens[0] / run["tokens"])
            continue
        part = (means[last - 1] - goal) / (means[last - 1] - means[last])
        at = tokens[last - 1] + part * (tokens[last] - tokens[last - 1])
        shares.append(at / run["tokens"])
    return Interval.of(np.array(shares))


def mean_curve(runs: Sequence[Result], tasks: Sequence[str]) -> list[tuple[float, float]]:
    """[(training tokens, loss averaged over tasks and runs), …]."""
    points = zip(*(run["curve"] for run in runs), strict=True)
    return [
        (point[0][0], float(np.mean([part[1][task] for part in point for task in tasks])))
        for point in points
    ]


def decision_cost(outcome: Outcome) -> tuple[float, float, float]:
    """FLOPs and seconds of deciding, a run, and FLOPs over those of a run's training."""
    choice, runs = outcome.policy.choice, outcome.runs
    flops = float(np.mean([run["decision_flops"] for run in runs]))
    seconds = float(np.mean([run["decision_seconds"] for run in runs]))
    if choice is not None:
        flops, seconds = flops + choice.flops, seconds + choice.seconds
    return flops, seconds, flops / float(np.mean([run["flops"] for run in runs]))


def comparison(
    outcomes: Sequence[Outcome], tasks: Sequence[str], unseen: Sequence[str]
) -> list[dict[str, Any]]:
    """A row of figures for each policy."""
    named = by_name(outcomes)
    uniform, best = named["uniform"].runs, named["best static"].runs
    rows = []
    for outcome in outcomes:
        flops, seconds, share = decision_cost(outcome)
        rows.append(
            {
                "policy": outcome.policy.name,
                "loss": Interval.of(losses(outcome.runs, tasks)),
                "difference": difference(outcome.runs, uniform, tasks),
                "gap_closed": gap_closed(outcome.runs, uniform, best, tasks),
                "tokens": tokens_to_reach(outcome.runs, uniform, tasks),
                "unseen": difference(outcome.runs, uniform, unseen) if unseen else None,
                "decision_flops": flops,
                "decision_seconds": seconds,
                "decision_share": share,
            }
        )
    return rows
