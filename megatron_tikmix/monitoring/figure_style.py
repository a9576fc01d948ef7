"""The looks all pictures share, and the two rules that keep arbitrary names from breaking them.

Plotly reads a kind of HTML, so every name goes through `label`. Axes of names are positions with
tick labels, never plotly's categories: two long names may be shortened alike and must not fall
on one row, and a name like `2020` must not become a number.
"""

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from megatron_tikmix.monitoring.formatting import shorten

COLOURS = [
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7"),
    *("#a463f2", "#97bbf5", "#9c6b4e", "#1b7f8c", "#c3b340", "#7a4988"),
]
OTHERS = "#d5d8dd"
INK, FAINT, RULE = "#22262e", "#6b7280", "#e3e6ea"


def label(name: object, width: int = 30) -> str:
    """A name that is safe in plotly, and short enough for an axis."""
    return html.escape(shorten(name, width), quote=False)


def dress(figure: go.Figure, **layout: Any) -> go.Figure:
    """Give `figure` the house style and `layout`; return it."""
    margin = {"l": 10, "r": 10, "t": 20, "b": 10} | layout.pop("margin", {})
    family = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
    figure.update_layout(
        template="none",
        margin=margin,
        font={"family": family, "size": 13, "color": INK},
        hoverlabel={"align": "left", "namelength": -1},
        **layout,
    )
    axis = {"automargin": True, "gridcolor": RULE, "zerolinecolor": RULE, "linecolor": RULE}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure


def row_height(domains: Sequence[str]) -> int:
    """Pixels a domain gets on a vertical axis: comfortable for a few, just legible for many."""
    return max(16, min(32, 720 // max(len(domains), 1)))


def name_axis(domains: Sequence[str]) -> dict[str, Any]:
    """Settings of a vertical axis of names, the first on top, every name shown."""
    return {
        "tickvals": list(range(len(domains))),
        "ticktext": [label(name) + " " for name in domains],
        "tickfont": {"size": 13 if row_height(domains) > 20 else 11},
        "ticks": "",
        "range": [len(domains) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
        "showline": False,
    }
