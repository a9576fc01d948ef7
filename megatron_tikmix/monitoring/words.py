"""Numbers as people read them: the same in the report, in TensorBoard and on the terminal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DASH = "\N{EN DASH}"
"""Stands where there is no number."""
UNITS = ["", " k", " M", " B", " T"]


def count(value: float | None) -> str:
    """3 significant digits and a unit: 512, 98.3 k, 2.95 M, 1.02 B."""
    if value is None or not math.isfinite(value):
        return DASH
    thousands = 0
    while abs(value) >= 999.5 and thousands < len(UNITS) - 1:
        value, thousands = value / 1000, thousands + 1
    digits = f"{value:#.3g}" if thousands else f"{value:.3g}"
    return digits.rstrip(".") + UNITS[thousands]


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 -> 12.3 %."""
    if share is None or not math.isfinite(share):
        return DASH
    return f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Fixed decimals, or a dash where nothing was measured."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """Fixed decimals, always with a sign: +0.82, −0.13."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def with_error(value: float, error: float, between: str = " ± ") -> str:
    """A measurement: +0.82 ± 0.10."""
    return f"{signed(value)}{between}{number(error, 2)}" if math.isfinite(value) else DASH


def duration(seconds: float | None) -> str:
    """1:20, or 2:03:09."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def clean(name: object) -> str:
    """A name without the characters that would break a line, or steer a terminal."""
    spaced = "".join(" " if letter.isspace() else letter for letter in str(name))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def shorten(name: object, width: int) -> str:
    """A name of at most `width` characters; the middle goes, for ends tell names apart."""
    text = clean(name)
    if len(text) <= width:
        return text
    head = 2 * (width - 1) // 3
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


# What one row of the ledger says: the matrix behind a decision, its moves, and words for it.
#
# Letters as everywhere: V tasks, D domains.


Array = NDArray[np.float64]


@dataclass(frozen=True)
class Influence:
    """S_VD as measured at a boundary, in the benefit sign.

    Positive means that training on the domain lowers the task's loss.
    """

    tasks: Sequence[str]
    domains: Sequence[str]
    values_VD: Array
    errors_VD: Array

    @classmethod
    def of(cls, row: Mapping[str, Any], domains: Sequence[str] | None = None) -> "Influence | None":
        """The matrix of a ledger row, its columns in the order of `domains`; None if not measured.

        What the row does not hold (a domain that came later, a number that was not finite) is NaN.
        """
        values = row.get("influence")
        if not values:
            return None
        errors = row.get("influence_se") or {}
        domains = list(row["weights"]) if domains is None else domains

        def table(of_task: Mapping[str, Mapping[str, float | None]]) -> Array:
            rows = [[of_task.get(task, {}).get(domain) for domain in domains] for task in values]
            return np.array(rows, dtype=np.float64).reshape(len(values), len(domains))

        return cls(list(values), domains, table(values), table(errors))

    def relative(self) -> "Influence":
        """Every task's row divided by its largest |entry|, so that tasks can be compared."""
        largest_V1 = np.abs(np.nan_to_num(self.values_VD)).max(axis=1, keepdims=True)
        largest_V1[largest_V1 == 0] = 1.0
        return Influence(
            self.tasks, self.domains, self.values_VD / largest_V1, self.errors_VD / largest_V1
        )

    def mean(self) -> tuple[Array, Array]:
        """Mean over tasks and its error, both of shape D.

        All tasks share a domain's probe, so their errors may move together: the error of the
        mean is taken as the mean of the errors, which no correlation can exceed.
        """
        return self.values_VD.mean(axis=0), self.errors_VD.mean(axis=0)

    def is_noise(self) -> NDArray[np.bool_]:
        """Entries within two standard errors of zero, and those without a known error."""
        return ~(np.abs(self.values_VD) > 2 * self.errors_VD)


def mean_loss(task_loss: Mapping[str, float | None]) -> float:
    """Mean over tasks; NaN where one of them is not known."""
    losses = np.array(list(task_loss.values()), dtype=np.float64)
    return float(losses.mean()) if losses.size else math.nan


@dataclass(frozen=True)
class Move:
    """A domain's weight before and after a boundary."""

    domain: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    def in_words(self) -> str:
        """noise −13.9 points (16.7 → 2.8 %), with the figures kept on one line."""
        figures = f"({100 * self.before:.1f} → {100 * self.after:.1f} %)"
        figures = figures.replace(" ", "\N{NO-BREAK SPACE}")
        return f"{clean(self.domain)} {signed(100 * self.change, 1)} points {figures}"


def moves(former: Mapping[str, float], weights: Mapping[str, float]) -> list[Move]:
    """What changed between two mixtures, the largest first."""
    names = dict.fromkeys([*former, *weights])
    found = [Move(name, former.get(name, 0.0), weights.get(name, 0.0)) for name in names]
    return sorted(found, key=lambda move: -abs(move.change))


def variation_in_words(row: Mapping[str, Any]) -> str:
    """How far the mixture moved, beside what the noise of the probe alone would move it."""
    moved = row.get("total_variation")
    if moved is None:
        return DASH
    noise = row.get("total_variation_noise")
    return number(moved) if noise is None else f"{number(moved)} (noise {number(noise)})"


def decision_in_words(former: Mapping[str, Any] | None, row: Mapping[str, Any]) -> str:
    """The decision as a few sentences: what happened, why, how far, at what cost."""
    parts = [f"{row.get('source', 'unknown')}: {sentence(row.get('reason'))}"]
    if row.get("total_variation") is not None:
        parts.append(f"Total variation {variation_in_words(row)}.")
    if former is not None:
        largest = [move for move in moves(former["weights"], row["weights"]) if move.change][:3]
        if largest:
            parts.append(f"Largest moves: {'; '.join(move.in_words() for move in largest)}.")
    parts.append(cost_in_words(row))
    return " ".join(part for part in parts if part)


def cost_in_words(row: Mapping[str, Any]) -> str:
    """What the probe and the rollouts of this boundary took; empty where none was run."""
    parts = []
    if row.get("probe_tokens"):
        parts.append(_spent("Probe", row["probe_tokens"], row.get("probe_seconds")))
    rollout, audit = row.get("rollout"), row.get("audit")
    if rollout:
        tokens = rollout["trained_tokens"] + rollout["evaluated_tokens"]
        name = f"{rollout['rollouts']} rollouts"
        parts.append(_spent(name, tokens, rollout["seconds"]))
    if audit:
        parts.append(sentence(audit["reason"][:1].upper() + audit["reason"][1:]))
        tokens = audit["trained_tokens"] + audit["evaluated_tokens"]
        parts.append(_spent("Audit", tokens, audit["seconds"]))
    return " ".join(parts)


def _spent(what: str, tokens: int, seconds: float | None) -> str:
    time = "" if seconds is None else f" in {number(seconds, 1)} s"
    return f"{what}: {count(tokens)} tokens{time}."


def sentence(text: object) -> str:
    """`text` closed by a full stop."""
    words = clean(text).strip() if text else "no reason recorded"
    return words if words.endswith((".", "!", "?")) else words + "."
