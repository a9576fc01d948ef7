"""The pictures of report.html: weights, influence, losses, consumption, and the baseline.

They draw the contents of `RunHistory` and compute next to nothing. Two rules keep arbitrary names
from breaking them. Plotly interprets some HTML, so every name goes through `label`. Axes of names
are positions with tick labels, never plotly's categories: two long names that are shortened to the
same label must not share a row, and a name like `2020` must not become a number.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from megatron_tikmix.monitoring.answers import Answer
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.words import (
    Array,
    Influence,
    count,
    mean_loss,
    number,
    percent,
    shorten,
    with_error,
)

COLOURS = [
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7"),
    *("#a463f2", "#97bbf5", "#9c6b4e", "#1b7f8c", "#c3b340", "#7a4988"),
]
OTHERS = "#d5d8dd"
INK, FAINT, RULE = "#22262e", "#6b7280", "#e3e6ea"
GAIN, LOSS, CAP, CROWD = "#1f5f9e", "#b2562b", "#d62728", "#9db8e8"
LONGEST_LEGEND = len(COLOURS)
MOST_CHANGES = 24
"""The most domains that `largest_changes` draws."""

HARM, ZERO, BENEFIT = ("#b2562b", "#e5a27c"), "#fbfaf7", ("#7fb0d8", "#1f5f9e")
DIVERGING = list(zip((0, 0.25, 0.5, 0.75, 1), (*HARM, ZERO, *BENEFIT), strict=True))
GREY = [(0, "#e6e8ec"), (1, "#e6e8ec")]
GREY_TEXT = "#7b818c"
ROOM_FOR_NUMBERS = 8
"""With more tasks than this, cells are too narrow for numbers."""


def label(name: object, width: int = 30) -> str:
    """Return a name that is safe in plotly, and short enough for an axis."""
    return html.escape(shorten(name, width), quote=False)


def dress(figure: go.Figure, **layout: Any) -> go.Figure:
    """Give `figure` the style that all pictures share, and the settings in `layout`; return it."""
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
    """Return the height of a domain's row in pixels: ample for few, just legible for many."""
    return max(16, min(32, 720 // max(len(domains), 1)))


def name_axis(domains: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a vertical axis of names, the first on top, every name shown."""
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


def crowded(history: RunHistory) -> bool:
    """Return whether there are more domains than can have a colour of their own."""
    return len(history.domains) > LONGEST_LEGEND


def weights_over_time(history: RunHistory) -> go.Figure:
    """Draw the stacked weights, one block for each stage, in which they are constant."""
    figure = go.Figure()
    starts, widths = _blocks(history.edges)

    def stack(name: str, colour: str, weight_K: Array, hovers: list[str]) -> None:
        figure.add_bar(
            x=starts,
            width=widths,
            offset=0,
            y=100 * weight_K,
            name=name,
            marker={"color": colour, "line": {"width": 0.6, "color": "white"}},
            hovertext=hovers,
            hoverinfo="text",
        )

    named, others = _named_and_others(history)
    for colour, d in zip(COLOURS, named, strict=False):
        name, weight_K = history.domains[d], history.weights_KD[:, d]
        hovers = [
            f"<b>{label(name, 60)}</b><br>stage {row.stage}, from iteration {start:,}<br>"
            f"weight {percent(weight_K[k], 2)}<br>realised {_realised(history.realised_KD[k, d])}"
            for k, (row, start) in enumerate(zip(history.stages, starts, strict=True))
        ]
        stack(label(name), colour, weight_K, hovers)
    if others:
        weights_KO = history.weights_KD[:, others]
        hovers = [
            f"<b>{len(others)} other domains</b><br>stage {row.stage}<br>"
            f"together {percent(weight_O.sum())}, each at most {percent(weight_O.max(), 2)}"
            for row, weight_O in zip(history.stages, weights_KO, strict=True)
        ]
        stack(f"{len(others)} others", OTHERS, weights_KO.sum(axis=1), hovers)
    dress(figure, height=420, barmode="stack", legend={"traceorder": "reversed"})
    figure.update_xaxes(title="iteration", range=[starts[0], starts[-1] + widths[-1]])
    figure.update_yaxes(title="weight", range=[0, 100.01], ticksuffix=" %")
    return figure


def largest_changes(history: RunHistory) -> go.Figure:
    """Draw first and last weight of the domains that moved most, the largest gain on top."""
    first_D, last_D = history.weights_KD[0], history.weights_KD[-1]
    by_size = np.argsort(-np.abs(last_D - first_D), kind="stable")[:MOST_CHANGES].tolist()
    shown = sorted(by_size, key=lambda d: first_D[d] - last_D[d])
    names = [history.domains[d] for d in shown]
    figure = go.Figure()
    for row, d in enumerate(shown):
        before, after = 100 * first_D[d], 100 * last_D[d]
        figure.add_scatter(
            x=[before, after],
            y=[row, row],
            mode="lines+markers",
            line={"color": GAIN if after > before else LOSS, "width": 3},
            marker={"symbol": ["circle", "circle"], "size": [6, 12]},
            hovertext=f"<b>{label(names[row], 60)}</b><br>{before:.2f} % → {after:.2f} %",
            hoverinfo="text",
            showlegend=False,
        )
    dress(figure, height=90 + 24 * len(shown))
    figure.update_xaxes(
        title="weight, from the first (small dot) to the last (large dot)",
        rangemode="tozero",
        ticksuffix=" %",
    )
    figure.update_yaxes(**name_axis(names))
    return figure


def task_losses(history: RunHistory) -> go.Figure:
    """Draw the loss of every task at every evaluation, with training loss and boundaries."""
    figure = go.Figure()
    figure.add_scatter(
        x=[row["iteration"] for row in history.metrics],
        y=[row.get("lm_loss") for row in history.metrics],
        name="training (lm loss)",
        mode="lines",
        line={"color": "#c4c8cf", "width": 1.5},
    )
    evaluated = history.task_losses
    tasks = list(dict.fromkeys(task for losses in evaluated.values() for task in losses))
    lines = {task: [losses.get(task) for losses in evaluated.values()] for task in tasks}
    means = list(history.mean_task_loss.values())
    _draw_tasks(figure, list(evaluated), lines, means, _task_colours(history, tasks))
    for row in history.stages[1:]:
        figure.add_vline(x=row.start_iteration, line={"color": FAINT, "width": 1, "dash": "dot"})
    dress(figure, height=420, hovermode=_hover_mode(tasks))
    figure.update_xaxes(title="iteration", rangemode="tozero")
    figure.update_yaxes(title="loss", hoverformat=".4f")
    return figure


def baseline_differences(points: Sequence[Answer]) -> go.Figure:
    """Draw each task's loss minus the baseline's, and their mean, over the tokens trained on.

    Args:
        points: `losses` of :func:`answers.compare`, of the baseline and of this run.
    """
    tasks = list(dict.fromkeys(task for point in points for task in point["tasks"]))
    unit = "samples" if points[0]["tokens"] is None else "tokens"
    differences = [
        {task: entry["difference"] for task, entry in point["tasks"].items()} for point in points
    ]
    lines = {task: [found.get(task) for found in differences] for task in tasks}
    figure, means = go.Figure(), [mean_loss(found) for found in differences]
    colours = dict(zip(tasks, COLOURS, strict=False))
    _draw_tasks(figure, [point[unit] for point in points], lines, means, colours)
    figure.add_hline(y=0, line={"color": FAINT, "width": 1, "dash": "dot"})
    dress(figure, height=340, hovermode=_hover_mode(tasks))
    figure.update_xaxes(title=unit, rangemode="tozero")
    figure.update_yaxes(title="this run − baseline", hoverformat="+.4f")
    return figure


def tokens_and_epochs(history: RunHistory) -> go.Figure:
    """Draw each domain's tokens and epochs so far, in one shade for each stage."""
    length, rows = history.sequence_length, list(range(len(history.domains)))
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.04)
    height = 120 + row_height(history.domains) * max(len(rows), 2)
    dress(figure, height=height, barmode="stack", bargap=0.25, legend={"tracegroupgap": 0})
    shades = sample_colorscale("Blues", np.linspace(0.3, 1, max(len(history.stages), 2)).tolist())
    drawn = "samples" if length is None else "tokens"
    panels = (
        (history.samples_KD * (length or 1), drawn, count),
        (history.epochs_KD, "epochs", number),
    )
    for column, (amount_KD, unit, written) in enumerate(panels, start=1):
        total_D = amount_KD.sum(axis=0)
        for k, row in enumerate(history.stages):
            hovers = [
                f"<b>{label(name, 60)}</b><br>{written(amount)} {unit} in stage {row.stage}<br>"
                f"{written(total)} {unit} in all"
                for name, amount, total in zip(history.domains, amount_KD[k], total_D, strict=True)
            ]
            figure.add_bar(
                x=amount_KD[k],
                y=rows,
                orientation="h",
                name=f"stage {row.stage}",
                legendgroup=str(k),
                showlegend=column == 1 and len(history.stages) <= LONGEST_LEGEND,
                marker={"color": shades[k], "line": {"width": 0}},
                hovertext=hovers,
                hoverinfo="text",
                row=1,
                col=column,
            )
        figure.update_xaxes(title=unit, side="top", rangemode="tozero", row=1, col=column)
    _mark_caps(figure, history)
    _mark_one_epoch(figure, history)
    figure.update_yaxes(**name_axis(history.domains))
    figure.update_yaxes(showticklabels=False, row=1, col=2)
    return figure


def _draw_tasks(
    figure: go.Figure,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
    means: Sequence[float],
    colours: Mapping[str, str],
) -> None:
    """Draw a line for each task, all alike if they are too many for colours, and their mean."""
    crowd = len(lines) > LONGEST_LEGEND
    for place, (task, y) in enumerate(lines.items()):
        figure.add_scatter(
            x=x,
            y=y,
            name=f"each of {len(lines)} tasks" if crowd else label(task),
            legendgroup="crowd" if crowd else None,
            showlegend=not crowd or place == 0,
            mode="lines" if crowd else "lines+markers",
            line={"color": CROWD, "width": 0.8} if crowd else {"color": colours[task]},
            hovertext=f"<b>{label(task, 60)}</b>" if crowd else None,
        )
    if len(lines) > 1:
        figure.add_scatter(
            x=x,
            y=means,
            name="mean over tasks",
            mode="lines+markers",
            line={"color": INK, "width": 3},
        )


def _hover_mode(tasks: Sequence[str]) -> str:
    return "closest" if len(tasks) > LONGEST_LEGEND else "x unified"


def _task_colours(history: RunHistory, tasks: Sequence[str]) -> dict[str, str]:
    """Return the colour of each task; empty if there are more tasks than colours.

    A task on a domain's held-out split has that domain's colour; others have unused ones.
    """
    if len(tasks) > LONGEST_LEGEND:
        return {}
    named, _ = _named_and_others(history)
    of_domain = dict(zip((history.domains[d] for d in named), COLOURS, strict=False))
    shared = {task: of_domain[task] for task in tasks if task in of_domain}
    free = iter(colour for colour in COLOURS if colour not in shared.values())
    return {task: shared.get(task) or next(free) for task in tasks}


def _mark_caps(figure: go.Figure, history: RunHistory) -> None:
    """Draw a tick at each domain's `max_epochs`, unless that would shrink the bars to specks."""
    epochs_D, caps_D = np.nan_to_num(history.epochs_KD.sum(axis=0)), history.epoch_caps_D
    near = [d for d, cap in enumerate(caps_D) if cap <= 3 * epochs_D.max(initial=0.0)]
    if not near:
        return
    figure.add_scatter(
        x=caps_D[near],
        y=near,
        mode="markers",
        marker={
            "symbol": "line-ns",
            "size": 0.7 * row_height(history.domains),
            "line": {"color": CAP, "width": 2},
        },
        name="cap",
        hovertext=[
            f"<b>{label(history.domains[d], 60)}</b><br>at most {caps_D[d]:g} epochs, "
            f"{number(epochs_D[d])} so far"
            for d in near
        ],
        hoverinfo="text",
        row=1,
        col=2,
    )


def _mark_one_epoch(figure: go.Figure, history: RunHistory) -> None:
    """Draw a line at one epoch, once some domain has come near it."""
    if np.isnan(history.epochs_KD).all():
        figure.add_annotation(
            text="epochs are known from the first boundary on",
            showarrow=False,
            font={"color": FAINT},
            xref="x2 domain",
            yref="y2 domain",
            x=0.5,
            y=0.5,
        )
        figure.update_xaxes(showticklabels=False, row=1, col=2)
    elif np.nansum(history.epochs_KD, axis=0).max() > 0.5:
        figure.add_vline(x=1, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=2)


def _blocks(edges: Sequence[int]) -> tuple[list[int], list[float]]:
    """Return start and width of each stage's block; a stage that has only begun is a sliver."""
    sliver = max(1.0, 0.01 * (edges[-1] - edges[0]))
    return list(edges[:-1]), [max(float(width), sliver) for width in np.diff(edges)]


def _named_and_others(history: RunHistory) -> tuple[list[int], list[int]]:
    """Return the domains with a colour of their own, those of the largest weights, and the rest."""
    if len(history.domains) <= LONGEST_LEGEND:
        return list(range(len(history.domains))), []
    by_peak = np.argsort(-history.weights_KD.max(axis=0), kind="stable").tolist()
    return sorted(by_peak[: LONGEST_LEGEND - 1]), sorted(by_peak[LONGEST_LEGEND - 1 :])


def _realised(share: float) -> str:
    return percent(share, 2) if np.isfinite(share) else "nothing drawn yet"


def influence_maps(history: RunHistory) -> go.Figure:
    """Draw influence matrices as heat maps, domains down and tasks across, one for each boundary.

    Cells that differ from zero by more than their noise are coloured; the others are grey, however
    large they are, since a decision based on them is a gamble. A slider selects the boundary,
    beginning at the last one.
    """
    tasks = list(dict.fromkeys(task for _, matrix in history.measured for task in matrix.tasks))
    names = [label(task, 22) for task in tasks]
    upright = len(tasks) > ROOM_FOR_NUMBERS
    # Pixels above the map: room for the tasks' names, and for the slider where there is one.
    above = 30 + 7 * max(map(len, names)) if upright else 40
    slider = 90 if len(history.measured) > 1 else 0
    figure = go.Figure()
    for row, matrix in history.measured:
        for layer in _layers(row.stage, matrix, tasks):
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
    """Yield two layers that share the cells between them: noise in grey, the rest in colour."""
    noise_DV = matrix.is_noise().T
    relative_DV = np.round(matrix.relative().values_VD.T, 3)
    texts_DV, hovers_DV = _cell_texts(stage, matrix)
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


def _cell_texts(stage: int, matrix: Influence) -> tuple[np.ndarray, np.ndarray]:
    """Return the text of each cell, and the text shown when the pointer is over it."""
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
    """Return a slider over the boundaries; each step shows the two layers of one of them."""
    layers = range(2 * len(history.measured))
    steps = [
        {
            "label": f"stage {row.stage}, iteration {row.start_iteration:,}",
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
