"""Numbers as people read them: the same in the report, in TensorBoard and on the terminal."""

import math

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
