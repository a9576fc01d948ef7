"""Numbers as people read them: the same in the report, in TensorBoard and on the terminal."""

import math

DASH = "\N{EN DASH}"
"""Stands where there is no number."""


def count(value: float | None) -> str:
    """3 significant digits and a unit: 512, 98.3 k, 2.95 M, 1.02 B."""
    if value is None or not math.isfinite(value):
        return DASH
    if abs(value) < 999.5:
        return f"{value:.3g}"
    for unit in ("k", "M", "B"):
        value /= 1000
        if abs(value) < 999.5:
            break
    else:
        value, unit = value / 1000, "T"
    return f"{value:#.3g}".rstrip(".") + f" {unit}"


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


def duration(seconds: float | None) -> str:
    """1:20, or 2:03:09."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def clean(name: object) -> str:
    """A domain or task name without the characters that would break a line or a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(name))


def shorten(name: object, width: int) -> str:
    """A name of at most `width` characters; the middle goes, for ends tell names apart."""
    text = clean(name)
    if len(text) <= width:
        return text
    head = 2 * (width - 1) // 3
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]
