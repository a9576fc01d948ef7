"""The influence matrices as heat maps, one a boundary, gone through with a slider.

What can be told from zero is coloured; what cannot is grey, however large it looks: a decision
made on grey cells is a gamble.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from megatron_tikmix.monitoring.decision import Influence
from megatron_tikmix.monitoring.figure_style import (
    COLOURS,
    FAINT,
    RULE,
    dress,
    label,
    name_axis,
    row_height,
)
from megatron_tikmix.monitoring.formatting import with_error
from megatron_tikmix.monitoring.history import RunHistory

HARM, ZERO, BENEFIT = ("#b2562b", "#e5a27c"), "#fbfaf7", ("#7fb0d8", "#1f5f9e")
DIVERGING = list(zip((0, 0.25, 0.5, 0.75, 1), (*HARM, ZERO, *BENEFIT), strict=True))
GREY = [(0, "#e6e8ec"), (1, "#e6e8ec")]
GREY_TEXT = "#7b818c"
ROOM_FOR_NUMBERS = 8
"""With more tasks than this beside each other, a cell is too narrow to be written in."""


def influence_maps(history: RunHistory) -> go.Figure:
    """Domains down, tasks across; opens on the last boundary."""
    tasks = list(dict.fromkeys(task for _, matrix in history.measured for task in matrix.tasks))
    names = [label(task, 22) for task in tasks]
    upright = len(tasks) > ROOM_FOR_NUMBERS
    # Pixels above the map: room for the tasks' names, and for the slider where there is one.
    above = 30 + 7 * max(map(len, names)) if upright else 40
    slider = 90 if len(history.measured) > 1 else 0
    figure = go.Figure()
    for row, matrix in history.measured:
        for layer in _layers(row["stage"], matrix, tasks):
            layer.visible = row is history.measured[-1][0]
            figure.add_trace(layer)
    dress(
        figure,
        height=above + slider + 20 + row_height(history.domains) * len(history.domains),
        margin={"t": above + slider},
        sliders=[_slider(history, above)] if slider else [],
    )
    figure.update_xaxes(
        side="top",
        tickvals=list(range(len(tasks))),
        ticktext=names,
        tickangle=-90 if upright else 0,
        ticks="",
        tickfont={"size": 11 if upright else 13},
        showgrid=False,
        zeroline=False,
        showline=False,
    )
    figure.update_yaxes(**name_axis(history.domains))
    return figure


def _layers(stage: int, matrix: Influence, tasks: Sequence[str]) -> Iterator[go.Heatmap]:
    """Two layers that share the cells between them: noise in grey, the rest in colour."""
    noise_DV = matrix.is_noise().T
    relative_DV = np.round(matrix.relative().values_VD.T, 3)
    texts_DV, hovers_DV = _words(stage, matrix)
    size = 12 if row_height(matrix.domains) > 20 else 10
    for hidden_DV, scale, font in (
        (~noise_DV, GREY, {"size": size, "color": GREY_TEXT}),
        (noise_DV, DIVERGING, {"size": size}),  # plotly picks black or white for contrast
    ):
        yield go.Heatmap(
            x=[tasks.index(task) for task in matrix.tasks],
            y=list(range(len(matrix.domains))),
            z=np.where(hidden_DV, np.nan, np.nan_to_num(relative_DV)),
            zmin=-1,
            zmax=1,
            colorscale=scale,
            showscale=False,
            xgap=1.5,
            ygap=1,
            text=np.where(hidden_DV, "", texts_DV),
            texttemplate="%{text}" if len(tasks) <= ROOM_FOR_NUMBERS else None,
            textfont=font,
            hovertext=np.where(hidden_DV, "", hovers_DV),
            hoverinfo="text",
            hoverongaps=False,
        )


def _words(stage: int, matrix: Influence) -> tuple[np.ndarray, np.ndarray]:
    """What is written in each cell, and what hovering over it tells."""
    relative, noise_VD = matrix.relative(), matrix.is_noise()
    texts_DV = np.full(noise_VD.T.shape, "", dtype=object)
    hovers_DV = np.full(noise_VD.T.shape, "", dtype=object)
    for v, task in enumerate(matrix.tasks):
        for d, domain in enumerate(matrix.domains):
            value, error = relative.values_VD[v, d], relative.errors_VD[v, d]
            texts_DV[d, v] = with_error(value, error)
            hovers_DV[d, v] = (
                f"<b>{label(domain, 60)}</b> for <b>{label(task, 60)}</b>, before stage {stage}<br>"
                f"influence {matrix.values_VD[v, d]:+.3g} ± {matrix.errors_VD[v, d]:.2g}<br>"
                f"{value:+.3f} ± {error:.3f} of this task's largest"
                + ("<br>cannot be told from zero" if noise_VD[v, d] else "")
            )
    return texts_DV, hovers_DV


def _slider(history: RunHistory, above: int) -> dict[str, Any]:
    """Steps through the boundaries: shows the two layers of one and hides all others'."""
    layers = range(2 * len(history.measured))
    steps = [
        {
            "label": f"stage {row['stage']}, iteration {row['start_iteration']:,}",
            "method": "update",
            "args": [{"visible": [layer // 2 == shown for layer in layers]}],
        }
        for shown, (row, _) in enumerate(history.measured)
    ]
    return {
        "steps": steps,
        "active": len(steps) - 1,
        # Labels stand centred under their steps: the margins keep the first and last on the page.
        "x": 0.08,
        "len": 0.84,
        "y": 1,
        "yanchor": "bottom",
        "pad": {"b": above, "t": 0},
        "currentvalue": {"prefix": "Measured before ", "font": {"size": 14}},
        "bgcolor": RULE,
        "bordercolor": RULE,
        "activebgcolor": COLOURS[0],
        "ticklen": 4,
        "font": {"size": 11, "color": FAINT},
    }
