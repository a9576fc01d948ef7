"""Numbers, names and decisions in words, for the report, TensorBoard and the terminal.

The second half reads one row of the ledger: the influence behind a decision, its moves, its cost,
and the decision in a few sentences. Compute is counted in tokens of training: a token that goes
forward and backward is one, a token that only goes forward (in an evaluation) is a third, since a
backward pass costs twice as much as a forward pass.

Letters: V tasks, D domains.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.decision.ledger import StageRow

DASH = "\N{EN DASH}"
"""The placeholder for a missing number."""
UNITS = ["", " k", " M", " B", " T"]

FORWARD = 1 / 3
"""Compute of a token that only goes forward, in tokens of training."""

Array = NDArray[np.float64]


def count(value: float | None) -> str:
    """Return 3 significant digits and a unit: 512, 98.3 k, 2.95 M, 1.02 B."""
    if value is None or not math.isfinite(value):
        return DASH
    thousands = 0
    while abs(value) >= 999.5 and thousands < len(UNITS) - 1:
        value, thousands = value / 1000, thousands + 1
    digits = f"{value:#.3g}" if thousands else f"{value:.3g}"
    return digits.rstrip(".") + UNITS[thousands]


def percent(share: float | None, digits: int = 1) -> str:
    """Return 0.1234 as 12.3 %."""
    if share is None or not math.isfinite(share):
        return DASH
    return f"{100 * share:.{digits}f} %"


def number(value: float | None, digits: int = 3) -> str:
    """Return fixed decimals, or a dash where nothing was measured."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """Return fixed decimals, always with a sign: +0.82, −0.13."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def with_error(value: float, error: float, between: str = " ± ") -> str:
    """Return a measurement as +0.82 ± 0.10."""
    return f"{signed(value)}{between}{number(error, 2)}" if math.isfinite(value) else DASH


def duration(seconds: float | None) -> str:
    """Return minutes and seconds, 1:20, or hours too, 2:03:09."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def clean(name: object) -> str:
    """Return a name without the characters that break a line or control a terminal."""
    spaced = "".join(" " if letter.isspace() else letter for letter in str(name))
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in spaced)


def shorten(name: object, width: int) -> str:
    """Return at most `width` characters of a name: both ends, where names differ most."""
    text = clean(name)
    if len(text) <= width:
        return text
    head = 2 * (width - 1) // 3
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


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
    def of(cls, row: StageRow, domains: Sequence[str] | None = None) -> "Influence | None":
        """Return the matrix of a ledger row, its columns in the order of `domains`, or None.

        Entries missing in the row (of a later domain, or not finite) are NaN.
        """
        matrix = row.influence
        if matrix is None:
            return None
        domains = list(row.weights) if domains is None else domains
        column = {name: d for d, name in enumerate(matrix.domains)}

        def table(array_VD: Array | None) -> Array:
            wide_VD = np.full((len(matrix.tasks), len(domains)), np.nan)
            if array_VD is not None:
                for d, name in enumerate(domains):
                    if name in column:
                        wide_VD[:, d] = array_VD[:, column[name]]
            return wide_VD

        return cls(matrix.tasks, domains, table(matrix.values_VD), table(matrix.standard_error_VD))

    def relative(self) -> "Influence":
        """Divide every task's row by its largest |entry|, so that tasks can be compared."""
        largest_V1 = np.abs(np.nan_to_num(self.values_VD)).max(axis=1, keepdims=True)
        largest_V1[largest_V1 == 0] = 1.0
        return Influence(
            self.tasks, self.domains, self.values_VD / largest_V1, self.errors_VD / largest_V1
        )

    def mean(self) -> tuple[Array, Array]:
        """Return the mean over tasks and its error, both of shape D.

        All tasks share a domain's probe, so their errors may move together: the error of the
        mean is taken as the mean of the errors, which no correlation can exceed.
        """
        return self.values_VD.mean(axis=0), self.errors_VD.mean(axis=0)

    def is_noise(self) -> NDArray[np.bool_]:
        """Return which entries are within two standard errors of zero, or have no known error."""
        return ~(np.abs(self.values_VD) > 2 * self.errors_VD)


def mean_loss(task_loss: Mapping[str, float | None]) -> float:
    """Return the mean over tasks; NaN where one of them is not known."""
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
        """Return "noise −13.9 points (16.7 → 2.8 %)", with the figures kept on one line."""
        figures = f"({100 * self.before:.1f} → {100 * self.after:.1f} %)"
        figures = figures.replace(" ", "\N{NO-BREAK SPACE}")
        return f"{clean(self.domain)} {signed(100 * self.change, 1)} points {figures}"


def moves(former: Mapping[str, float], weights: Mapping[str, float]) -> list[Move]:
    """Return each domain's change between two mixtures, the largest first."""
    names = dict.fromkeys([*former, *weights])
    found = [Move(name, former.get(name, 0.0), weights.get(name, 0.0)) for name in names]
    return sorted(found, key=lambda move: -abs(move.change))


@dataclass(frozen=True)
class Spent:
    """The cost of one part of a boundary.

    Attributes:
        kind: "probe", "rollouts" or "audit".
        trained_tokens: tokens that went forward and backward.
        evaluated_tokens: tokens that only went forward.
        seconds: None if not recorded.
    """

    kind: str
    trained_tokens: int
    evaluated_tokens: int
    seconds: float | None

    @property
    def tokens(self) -> int:
        return self.trained_tokens + self.evaluated_tokens

    @property
    def compute(self) -> float:
        """Compute, in tokens of training."""
        return self.trained_tokens + FORWARD * self.evaluated_tokens


def spent(row: StageRow) -> list[Spent]:
    """Return the cost of each part of the boundary before a stage."""
    parts = []
    if row.probe_tokens:
        parts.append(Spent("probe", row.probe_tokens, 0, row.probe_seconds))
    for kind, found in (("rollouts", row.rollout), ("audit", row.audit)):
        if found is not None:
            parts.append(Spent(kind, found.trained_tokens, found.evaluated_tokens, found.seconds))
    return parts


def variation_in_words(row: StageRow) -> str:
    """Say how far the mixture moved, and how far the noise of the probe alone would move it."""
    moved, noise = row.total_variation, row.total_variation_noise
    if moved is None:
        return DASH
    return number(moved) if noise is None else f"{number(moved)} (noise {number(noise)})"


def decision_in_words(former: StageRow | None, row: StageRow) -> str:
    """Say what was decided, why, how far the mixture moved, and what it cost."""
    parts = [f"{row.source or 'unknown'}: {sentence(row.reason)}"]
    if row.total_variation is not None:
        parts.append(f"Total variation {variation_in_words(row)}.")
    if former is not None:
        largest = [move for move in moves(former.weights, row.weights) if move.change][:3]
        if largest:
            parts.append(f"Largest moves: {'; '.join(move.in_words() for move in largest)}.")
    parts.append(cost_in_words(row))
    return " ".join(part for part in parts if part)


def cost_in_words(row: StageRow) -> str:
    """Say what each part of the boundary cost, and what the audit found; empty without any."""
    sentences = []
    for part in spent(row):
        name = part.kind.capitalize()
        if part.kind == "rollouts" and row.rollout is not None:
            name = f"{row.rollout.rollouts} rollouts"
        if part.kind == "audit" and row.audit is not None:
            reason = row.audit.reason
            sentences.append(sentence(reason[:1].upper() + reason[1:]))
        time = "" if part.seconds is None else f" in {number(part.seconds, 1)} s"
        sentences.append(f"{name}: {count(part.tokens)} tokens{time}.")
    return " ".join(sentences)


def sentence(text: object) -> str:
    """Return `text` closed by a full stop."""
    words = clean(text).strip() if text else "no reason recorded"
    return words if words.endswith((".", "!", "?")) else words + "."
