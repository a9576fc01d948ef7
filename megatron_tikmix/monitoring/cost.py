"""What a boundary costs: its probe, its rollouts and its audit, beside the training it decides on.

Compute is counted in tokens of training: a token that goes forward and backward is one, a token
that only goes forward (an evaluation) a third, for a backward pass is twice a forward one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORWARD = 1 / 3


@dataclass(frozen=True)
class Spent:
    """What one part of a boundary took.

    Attributes:
        kind: "probe", "rollouts" or "audit".
        trained_tokens: forward and backward.
        evaluated_tokens: forward only.
        seconds: None if not recorded.
    """

    kind: str
    trained_tokens: int
    evaluated_tokens: int
    seconds: float | None

    @property
    def compute(self) -> float:
        """In tokens of training."""
        return self.trained_tokens + FORWARD * self.evaluated_tokens


def spent(row: Mapping[str, Any]) -> list[Spent]:
    """The parts of the boundary before a stage, from its row of the ledger."""
    parts = []
    if row.get("probe_tokens"):
        parts.append(Spent("probe", row["probe_tokens"], 0, row.get("probe_seconds")))
    for kind, found in (("rollouts", row.get("rollout")), ("audit", row.get("audit"))):
        if found:
            tokens = found["trained_tokens"], found["evaluated_tokens"]
            parts.append(Spent(kind, *tokens, found.get("seconds")))
    return parts


def total(kind: str, parts: list[Spent]) -> Spent:
    """All parts of a kind in one."""
    mine = [part for part in parts if part.kind == kind]
    seconds = [part.seconds for part in mine if part.seconds is not None]
    return Spent(
        kind,
        sum(part.trained_tokens for part in mine),
        sum(part.evaluated_tokens for part in mine),
        sum(seconds) if seconds else None,
    )


def share_of_compute(parts: list[Spent], trained_tokens: float) -> float | None:
    """Of the compute of `parts` and of so many tokens of training; None without any of either."""
    part = sum(each.compute for each in parts)
    return part / (part + trained_tokens) if part + trained_tokens > 0 else None
