"""Pictures of the comparison as SVG, drawn from figures alone: nothing to install or load."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor
from typing import Any

_INK, _BAR, _OURS, _LINE = "#222", "#9db4c8", "#d97b29", "#bbb"
_LEFT, _WIDTH, _ROW = 190, 720, 26


def gap_closed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Bars of the gap closed by each policy, with 95% intervals; 100 is the best static mixture."""
    shown = [row for row in rows if row["policy"] != "uniform"]
    ends = [end for row in shown for end in (row["gap_closed"].low, row["gap_closed"].high)]
    finite = [100 * end for end in ends if end == end]
    low, high = min([0.0, *finite]) - 5, max([100.0, *finite]) + 5
    low = max(low, -60.0)  # a policy far worse than uniform must not squeeze the others

    def x(percent: float) -> float:
        inside = min(max(percent, low), high)
        return _LEFT + (inside - low) / (high - low) * (_WIDTH - _LEFT - 20)

    height = _ROW * len(shown) + 60
    parts = [_text(_LEFT, 18, "gap between uniform and the best static mixture closed, %", "start")]
    for tick in range(-50, int(high) + 1, 25):
        if tick >= low:
            parts.append(
                _line(x(tick), 28, x(tick), height - 26, _INK if tick in (0, 100) else _LINE)
            )
            parts.append(_text(x(tick), height - 10, str(tick), "middle"))
    for number, row in enumerate(shown):
        y = 32 + _ROW * number
        closed = row["gap_closed"]
        start, end = sorted((x(0), x(100 * closed.mean)))
        colour = _OURS if row["policy"].startswith("TiKMiX") else _BAR
        parts.append(
            f'<rect x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{_ROW - 8}" '
            f'fill="{colour}"/>'
        )
        if closed.low == closed.low:
            middle = y + (_ROW - 8) / 2
            parts.append(_line(x(100 * closed.low), middle, x(100 * closed.high), middle, _INK))
        parts.append(_text(_LEFT - 8, y + _ROW - 13, row["policy"], "end"))
    return _picture(height, parts)


def losses(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Mean task loss over tokens, a line for each policy; {name: [(tokens, loss), …]}."""
    height, bottom, top = 420, 380, 30
    points = [point for curve in curves.values() for point in curve[1:]]
    x_high = max(tokens for tokens, _ in points)
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    step = next(step for step in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if highest - lowest <= 8 * step)
    y_low, y_high = step * floor(lowest / step), step * ceil(highest / step)

    def place(tokens: float, loss: float) -> str:
        x = 60 + tokens / x_high * (_WIDTH - 230)
        return f"{x:.1f},{top + (y_high - loss) / (y_high - y_low) * (bottom - top):.1f}"

    colours = ["#777", "#4878a8", "#6a9a58", "#d97b29", "#a0519c", "#b9a43c"]
    parts = [_text(60, 18, "mean loss of the tasks, nats per token, over training tokens", "start")]
    for k in range(round((y_high - y_low) / step) + 1):
        loss = y_low + k * step
        y = float(place(0, loss).split(",")[1])
        parts += [_line(60, y, _WIDTH - 170, y, _LINE), _text(54, y + 4, f"{loss:.2f}", "end")]
    label_y = bottom + 14.0
    coloured = zip(curves.items(), colours * 4, strict=False)
    for (name, curve), colour in sorted(coloured, key=lambda item: item[0][1][-1][1]):
        line = " ".join(place(*point) for point in curve[1:])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        # From the lowest end upwards, each above the one before.
        label_y = min(float(place(*curve[-1]).split(",")[1]), label_y - 14)
        parts.append(_text(_WIDTH - 164, label_y + 4, name, "start", colour))
    parts.append(_text(_WIDTH - 170, bottom + 24, f"{x_high / 1e6:.2g} M tokens", "end"))
    return _picture(height, parts)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{colour}" fill="none"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = _INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"


def _picture(height: int, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
