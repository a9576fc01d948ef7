"""The part of the report that holds a run's task losses against those of another run."""

from pathlib import Path

import plotly.graph_objects as go

from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring.decision import mean_loss
from megatron_tikmix.monitoring.figure_style import COLOURS, FAINT, INK, dress, label
from megatron_tikmix.monitoring.formatting import clean, count, number, percent, signed
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.inspection import Answer, compare, open_run
from megatron_tikmix.monitoring.page import picture, section, table, text

TITLE = "Against the baseline"


def baseline(history: RunHistory, baseline_dir: str | Path | None) -> str:
    """Differences of task losses after equally many samples; empty without a baseline.

    Raises:
        InputError: the directory that was asked for holds no run. One that only the configuration
            names may be gone by now: that is said on the page.
    """
    named = baseline_dir or history.setting("baseline")
    if not named:
        return ""
    try:
        other = open_run(str(named))
    except InputError as error:
        if baseline_dir:
            raise
        return section(TITLE, "", text("p", str(error), "hint"))
    answer = compare(other, history)  # differences: this run less the baseline
    points = [row for row in answer["losses"] if row["tasks"]]
    shares = [percent(share) for share in reversed(answer["probe_token_share"])]
    hint = (
        f"Loss of each task less that of {clean(Path(named).name)} after equally many training "
        f"samples: below 0, this run is better. What probes took is not counted: {shares[0]} of "
        f"all tokens processed here, {shares[1]} there."
    )
    if not points:
        words = "The two runs were never evaluated on a common task after equally many samples."
        return section(TITLE, hint, text("p", words, "hint"))
    return section(TITLE, hint, picture("baseline", _differences(points)) + _last(points[-1]))


def _differences(points: list[Answer]) -> go.Figure:
    """A line a task, over tokens; and the mean."""
    tasks = list(dict.fromkeys(task for point in points for task in point["tasks"]))
    crowd = len(tasks) > len(COLOURS)
    unit = "samples" if points[0]["tokens"] is None else "tokens"
    x = [point[unit] for point in points]
    figure = go.Figure()
    for t, task in enumerate(tasks):
        found = [point["tasks"].get(task, {}).get("difference") for point in points]
        figure.add_scatter(
            x=x,
            y=found,
            name=f"each of {len(tasks)} tasks" if crowd else label(task),
            legendgroup="crowd" if crowd else None,
            showlegend=not crowd or t == 0,
            mode="lines" if crowd else "lines+markers",
            line={"color": "#9db8e8", "width": 0.8} if crowd else {"color": COLOURS[t]},
            hovertext=f"<b>{label(task, 60)}</b>" if crowd else None,
        )
    if len(tasks) > 1:
        means = [
            mean_loss({task: entry["difference"] for task, entry in point["tasks"].items()})
            for point in points
        ]
        figure.add_scatter(
            x=x,
            y=means,
            name="mean over tasks",
            mode="lines+markers",
            line={"color": INK, "width": 3},
        )
    figure.add_hline(y=0, line={"color": FAINT, "width": 1, "dash": "dot"})
    dress(figure, height=340, hovermode="closest" if crowd else "x unified")
    figure.update_xaxes(title=unit, rangemode="tozero")
    figure.update_yaxes(title="this run − baseline", hoverformat="+.4f")
    return figure


def _last(point: Answer) -> str:
    """The last point in common, as a table."""
    unit = "samples" if point["tokens"] is None else "tokens"
    head = f"after {count(point[unit])} {unit}"
    columns = {head: ""} | dict.fromkeys(["this run", "baseline", "difference"], "right")
    rows = [
        [
            clean(task),
            number(entry["second"], 4),
            number(entry["first"], 4),
            signed(entry["difference"], 4),
        ]
        for task, entry in point["tasks"].items()
    ]
    if len(rows) > 1:
        entries = point["tasks"]
        first, second = (
            mean_loss({task: entry[of] for task, entry in entries.items()})
            for of in ("first", "second")
        )
        mean = ["mean over tasks", number(second, 4), number(first, 4), signed(second - first, 4)]
        rows.append(mean)
    return table("baseline-losses", columns, rows)
