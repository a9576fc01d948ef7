"""Three of the report's pictures: weights, task losses, tokens and epochs. (`heat_maps` has the
fourth.) They draw what `RunHistory` holds and compute next to nothing.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from megatron_tikmix.monitoring.decision import Array
from megatron_tikmix.monitoring.figure_style import (
    COLOURS,
    FAINT,
    INK,
    OTHERS,
    dress,
    label,
    name_axis,
    row_height,
)
from megatron_tikmix.monitoring.formatting import count, number, percent
from megatron_tikmix.monitoring.history import RunHistory

LONGEST_LEGEND = len(COLOURS)
MOST_CHANGES = 24
GAIN, LOSS, CAP = "#1f5f9e", "#b2562b", "#d62728"


def crowded(history: RunHistory) -> bool:
    """Whether there are more domains than can have a colour of their own."""
    return len(history.domains) > LONGEST_LEGEND


def weights_over_time(history: RunHistory) -> go.Figure:
    """Stacked weights, one block a stage, for the mixture is constant between boundaries."""
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
            f"<b>{label(name, 60)}</b><br>stage {row['stage']}, from iteration {start:,}<br>"
            f"weight {percent(weight_K[k], 2)}<br>realised {_realised(history.realised_KD[k, d])}"
            for k, (row, start) in enumerate(zip(history.stages, starts, strict=True))
        ]
        stack(label(name), colour, weight_K, hovers)
    if others:
        weights_KO = history.weights_KD[:, others]
        hovers = [
            f"<b>{len(others)} other domains</b><br>stage {row['stage']}<br>"
            f"together {percent(weight_O.sum())}, each at most {percent(weight_O.max(), 2)}"
            for row, weight_O in zip(history.stages, weights_KO, strict=True)
        ]
        stack(f"{len(others)} others", OTHERS, weights_KO.sum(axis=1), hovers)
    dress(figure, height=420, barmode="stack", legend={"traceorder": "reversed"})
    figure.update_xaxes(title="iteration", range=[starts[0], starts[-1] + widths[-1]])
    figure.update_yaxes(title="weight", range=[0, 100.01], ticksuffix=" %")
    return figure


def largest_changes(history: RunHistory) -> go.Figure:
    """First and last weight of the domains that moved most, the largest gain on top."""
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
    """Loss of every task at every evaluation, over the training loss, with the boundaries."""
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
    crowd = len(tasks) > LONGEST_LEGEND
    colours = {} if crowd else _task_colours(history, tasks)
    for t, task in enumerate(tasks):
        figure.add_scatter(
            x=list(evaluated),
            y=[losses.get(task) for losses in evaluated.values()],
            name=f"each of {len(tasks)} tasks" if crowd else label(task),
            legendgroup="crowd" if crowd else None,
            showlegend=not crowd or t == 0,
            mode="lines" if crowd else "lines+markers",
            line={"color": "#9db8e8", "width": 0.8} if crowd else {"color": colours[task]},
            hovertext=f"<b>{label(task, 60)}</b>" if crowd else None,
        )
    if len(tasks) > 1:
        figure.add_scatter(
            x=list(evaluated),
            y=list(history.mean_task_loss.values()),
            name="mean over tasks",
            mode="lines+markers",
            line={"color": INK, "width": 3},
        )
    for row in history.stages[1:]:
        figure.add_vline(x=row["start_iteration"], line={"color": FAINT, "width": 1, "dash": "dot"})
    dress(figure, height=420, hovermode="closest" if crowd else "x unified")
    figure.update_xaxes(title="iteration", rangemode="tozero")
    figure.update_yaxes(title="loss", hoverformat=".4f")
    return figure


def tokens_and_epochs(history: RunHistory) -> go.Figure:
    """What was drawn from each domain so far, and how often over, in the shades of the stages."""
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
                f"<b>{label(name, 60)}</b><br>{written(amount)} {unit} in stage {row['stage']}<br>"
                f"{written(total)} {unit} in all"
                for name, amount, total in zip(history.domains, amount_KD[k], total_D, strict=True)
            ]
            figure.add_bar(
                x=amount_KD[k],
                y=rows,
                orientation="h",
                name=f"stage {row['stage']}",
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


def _task_colours(history: RunHistory, tasks: Sequence[str]) -> dict[str, str]:
    """A task that is a domain's held-out split has that domain's colour; others take free ones."""
    named, _ = _named_and_others(history)
    of_domain = dict(zip((history.domains[d] for d in named), COLOURS, strict=False))
    shared = {task: of_domain[task] for task in tasks if task in of_domain}
    free = iter(colour for colour in COLOURS if colour not in shared.values())
    return {task: shared.get(task) or next(free) for task in tasks}


def _mark_caps(figure: go.Figure, history: RunHistory) -> None:
    """A tick at each domain's `max_epochs`, unless it is so far away that bars would be specks."""
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
    """A line where a domain starts to repeat, once some domain has come near it."""
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
    """Start and width of each stage's block; one that has only begun is drawn as a sliver."""
    sliver = max(1.0, 0.01 * (edges[-1] - edges[0]))
    return list(edges[:-1]), [max(float(width), sliver) for width in np.diff(edges)]


def _named_and_others(history: RunHistory) -> tuple[list[int], list[int]]:
    """The domains that get a colour of their own, by the largest weight they ever had."""
    if len(history.domains) <= LONGEST_LEGEND:
        return list(range(len(history.domains))), []
    by_peak = np.argsort(-history.weights_KD.max(axis=0), kind="stable").tolist()
    return sorted(by_peak[: LONGEST_LEGEND - 1]), sorted(by_peak[LONGEST_LEGEND - 1 :])


def _realised(share: float) -> str:
    return percent(share, 2) if np.isfinite(share) else "nothing drawn yet"
