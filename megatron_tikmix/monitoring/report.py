"""report.html: what a run trained on, why, and what came of it, on one page that needs no network.

    tikmix report RUN_DIR [--baseline RUN_B]

Made from the run directory alone, so it can be made while the run goes on, and on any machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import yaml

from megatron_tikmix.decision.explain import Change, Explanation, explain
from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring import figures as heat_maps
from megatron_tikmix.monitoring import figures as pictures
from megatron_tikmix.monitoring.answers import Answer, compare, in_words, open_run
from megatron_tikmix.monitoring.figures import COLOURS, FAINT, INK, dress, label
from megatron_tikmix.monitoring.files import Row, RunFiles
from megatron_tikmix.monitoring.history import RunHistory, Spent
from megatron_tikmix.monitoring.page import details, page, picture, section, table, text, tiles
from megatron_tikmix.monitoring.words import (
    DASH,
    clean,
    count,
    duration,
    mean_loss,
    moves,
    number,
    percent,
    sentence,
    shorten,
    signed,
    variation_in_words,
    with_error,
)

NOTHING_YET = text("p", "Nothing to show yet.", "hint")


def write_report(run_dir: str | Path, baseline_dir: str | Path | None = None) -> Path:
    """Write `run_dir/report.html`, replacing an older one in a single step; return its path.

    Args:
        baseline_dir: the run whose task losses this one's are held against; None: the one that the
            run's configuration names as `baseline`, if any.

    Raises:
        InputError: a directory or file that cannot be read.
    """
    run_dir = Path(run_dir)
    history = RunHistory(RunFiles(run_dir))
    title = f"TiKMiX run: {clean(run_dir.resolve().name)}"
    # One line a section: a wider report is a longer list.
    parts = [
        head_of_page(title, history),
        weights(history),
        boundaries(history),
        influence(history),
        losses(history),
        baseline(history, baseline_dir),
        consumption(history),
        cost(history),
        mixture(history),
        configuration(history),
    ]
    path = run_dir / "report.html"
    draft = path.with_name(f"report.html.{os.getpid()}")
    draft.write_text(page(title, "".join(parts)), encoding="utf-8")
    draft.replace(path)  # a reader sees the old page or the new one, never half of one
    return path


def weights(history: RunHistory) -> str:
    hint = (
        "Each block is a stage; the height of a colour is the share of training tokens its domain "
        "is given, and the steps between blocks are the resets. Hover for the share really drawn."
    )
    if not history.stages:
        return section("Mixture over time", hint, NOTHING_YET)
    drawing = picture("weights", pictures.weights_over_time(history))
    if pictures.crowded(history) and len(history.stages) > 1:
        drawing += text("h3", "Domains whose weight moved most since the start")
        drawing += picture("changes", pictures.largest_changes(history))
    return section("Mixture over time", hint, drawing)


def influence(history: RunHistory) -> str:
    hint = (
        "How much training on a domain (row) would lower the loss of a task (column), as measured "
        "at a boundary. Blue helps, orange harms, ±1.00 is the strongest domain of a task; after ± "
        "stands one standard error. Grey cells are within two standard errors of zero: they cannot "
        "be told from no influence at all."
    )
    if len(history.measured) > 1:
        hint += " The slider goes through the boundaries."
    drawing = history.measured and picture("influence", heat_maps.influence_maps(history))
    return section("Influence of domains on tasks", hint, drawing or NOTHING_YET)


def losses(history: RunHistory) -> str:
    hint = (
        "Lower is better. The coloured lines are held-out losses, on items no decision used; "
        "dotted verticals are boundaries. The grey training loss also depends on the mixture."
    )
    known = history.metrics or history.task_losses
    drawing = known and picture("losses", pictures.task_losses(history))
    return section("Task losses", hint, drawing or NOTHING_YET)


def consumption(history: RunHistory) -> str:
    hint = (
        "What was drawn from each domain, light for early stages and dark for late ones, and how "
        "many times over: beyond the dotted line at 1, text is repeated. Red ticks are the caps of "
        "remix.constraints.max_epochs, where they are in sight."
    )
    drawing = history.samples and picture("consumption", pictures.tokens_and_epochs(history))
    return section("Tokens and epochs of each domain", hint, drawing or NOTHING_YET)


def boundaries(history: RunHistory) -> str:
    """What changed at each boundary, and why."""
    hint = (
        "Total variation is the share of the mixture that changed hands; its noise is what the "
        "same decision would move if the measurement were repeated."
    )
    columns = {"stage": "right", "iteration": "right", "source": "brief", "reason": ""}
    columns |= {"total variation": "", "largest moves": "", "probe (s)": "right"}
    rows = []
    for former, row in zip([None, *history.stages], history.stages, strict=False):
        largest = moves(former["weights"], row["weights"])[:3] if former else []
        rows.append(
            [
                str(row["stage"]),
                f"{row['start_iteration']:,}",
                clean(row.get("source", DASH)),
                sentence(row.get("reason")),
                variation_in_words(row),
                "; ".join(move.in_words() for move in largest if move.change) or DASH,
                number(row.get("probe_seconds"), 1),
            ]
        )
    content = table("boundaries", columns, rows) + reasons(history)
    return section("What changed, and why", hint, content)


def mixture(history: RunHistory) -> str:
    """Every domain, from first weight to last."""
    hint = (
        "Influence is the mean over tasks at the last boundary that measured it, each task counted "
        "relative to its strongest domain; its error is an upper bound."
    )
    amount = "tokens" if history.sequence_length else "samples"
    caps_D = history.epoch_caps_D
    capped = ["cap"] if np.isfinite(caps_D).any() else []
    heads = ["first weight", "last weight", amount, "epochs", *capped, "mean influence"]
    columns = {"domain": ""} | dict.fromkeys(heads, "right")
    drawn_D = history.samples_KD.sum(axis=0) * (history.sequence_length or 1)
    epochs_D = history.epochs_KD.sum(axis=0)
    mean = history.measured[-1][1].relative().mean() if history.measured else None
    rows = [
        [
            clean(name),
            percent(history.weights_KD[0, d], 2),
            percent(history.weights_KD[-1, d], 2),
            count(drawn_D[d]),
            number(epochs_D[d]),
            *(number(caps_D[d], 2) for _ in capped),
            with_error(mean[0][d], mean[1][d]) if mean else DASH,
        ]
        for d, name in enumerate(history.domains)
    ]
    return section("The mixture, domain by domain", hint, table("mixture", columns, rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of the run directory named on the command line; say where it is."""
    parser = argparse.ArgumentParser(
        prog="tikmix report",
        description="Write RUN_DIR/report.html, also while the run goes on.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--baseline",
        metavar="RUN_DIR",
        help="the run to hold task losses against (default: the configuration's `baseline`)",
    )
    parsed = parser.parse_args(arguments)
    try:
        print(write_report(parsed.run_dir, parsed.baseline))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())


def head_of_page(title: str, history: RunHistory) -> str:
    """Title, words and figures, as HTML."""
    length = history.sequence_length
    figures = [
        (count(history.samples * (length or 1)), f"{'tokens' if length else 'samples'} trained on"),
        (str(len(history.stages)), f"stages of the mixture, {len(history.domains)} domains"),
        (_first_and_last(history), "mean task loss"),
        (percent(history.probe_token_share), "of all tokens went to the probe"),
        (percent(history.probe_time_share), "of the time went to the probe"),
    ]
    words = in_words(history).replace(" %", "\N{NO-BREAK SPACE}%")
    head = text("h1", title) + text("p", words, "lead")
    return f"<header>{head}</header>{tiles(figures)}"


def _first_and_last(history: RunHistory) -> str:
    means = [number(mean, 2) for mean in history.mean_task_loss.values()]
    return " → ".join([means[0], *means[1:][-1:]]) if means else DASH


# The part of the report that holds a run's task losses against those of another run.


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


# The part of the report that says what pushed the domains that moved most at each boundary.


MOST_MOVES, LONGEST_NAME = 8, 26

HINT = (
    "What made the solver's answer differ from the mixture before, in points of weight; the parts "
    "add up to the change. Gain is summed over tasks; what multiplies all weights alike, so that "
    "they sum to 1, is under all alike. Noise is one standard error of gain and uniformity, at "
    "most. tikmix inspect why has every task."
)


def reasons(history: RunHistory) -> str:
    """A folded table for each boundary that solved something; empty without any."""
    parts = []
    for former, row in zip(history.stages, history.stages[1:], strict=False):
        found = _explained(history, former, row)
        if found:
            stage, iteration = row["stage"], f"{row['start_iteration']:,}"
            title = f"Stage {stage}, iteration {iteration}: what moved the domains that moved most"
            parts.append(details(title, _table(stage, found)))
    return text("p", HINT, "hint") + "".join(parts) if parts else ""


def _explained(history: RunHistory, former: Row, row: Row) -> list[Explanation]:
    """Of the domains that the answer moves most; none where the objective cannot be restated."""
    answer = (row.get("solution") or {}).get("mixture")
    if not answer:
        return []
    largest = [move.domain for move in moves(former["weights"], answer) if move.change]
    try:
        return [explain(history, name, row["stage"]) for name in largest[:MOST_MOVES]]
    except InputError:
        return []


def _table(stage: int, found: list[Explanation]) -> str:
    columns = {"domain": "brief", "weight (%)": "right", "gain": "right", "most from": ""}
    parts = ["uniformity", "diversity", "constraints", "all alike", "change", "noise (±)"]
    columns |= dict.fromkeys(parts, "right")
    rows = [
        [
            shorten(each.domain, LONGEST_NAME),
            f"{100 * each.before:.1f} → {100 * each.solved:.1f}",
            *_parts(each.change, each.solved - each.before),
        ]
        for each in found
    ]
    return table(f"reasons-{stage}", columns, rows)


def _parts(change: Change | None, total: float) -> list[str]:
    """In points; of an answer that is no certified optimum, only the change is known."""
    if change is None:
        return [DASH] * 6 + [signed(100 * total), DASH]
    most = max(change.gain, key=lambda task: abs(change.gain[task]))
    parts = (change.uniformity, change.diversity, change.constraints, change.shared, change.total)
    return [
        signed(100 * sum(change.gain.values())),
        f"{shorten(most, LONGEST_NAME)} {signed(100 * change.gain[most])}",
        *(signed(100 * part) for part in parts),
        number(None if change.noise is None else 100 * change.noise, 2),
    ]


# The parts of the report that keep the record: what the run cost, and what it was run with.


SETTINGS = {
    "layers × hidden size": ("model.num_layers", "model.hidden_size"),
    "parameters in": ("model.params_dtype",),
    "sequence length": ("data.sequence_length",),
    "batch, samples": ("train.global_batch_size",),
    "learning rate, largest and least": ("optimizer.lr", "optimizer.min_lr"),
    "seed": ("seed",),
    "policy": ("remix.policy", "remix.mode"),
    "interval, samples": ("remix.interval_samples",),
    "α, β, γ": ("remix.alpha", "remix.beta", "remix.gamma"),
    "gain, and what diversity is measured from": ("remix.gain", "remix.diversity_reference"),
    "influence, smoothing": ("remix.influence", "remix.smoothing"),
    "probe: curvature, sub-batches × samples": (
        "probe.curvature",
        "probe.sub_batches",
        "probe.sub_batch_samples",
    ),
}

NO_BOUND = {"lower": 0.0, "upper": 1.0, "pareto_slack": 0.0}


def cost(history: RunHistory) -> str:
    """Training beside all that was spent on deciding."""
    hint = (
        "Compute counts forward and backward passes; a token that only goes forward counts a "
        "third. Evaluations on held-out items and checkpoints are not counted."
    )
    trained = int(history.samples * (history.sequence_length or 0))
    training = Spent("training", trained, 0, history.training_seconds or None)
    parts = [training, *history.spent]
    columns = {"": ""} | dict.fromkeys(
        ["tokens", "compute, of training's", "time", "time, of training's"], "right"
    )
    rows = [
        [
            part.kind,
            count(part.trained_tokens + part.evaluated_tokens) if trained else DASH,
            percent(part.compute / training.compute if trained else None),
            duration(part.seconds),
            percent(part.seconds / training.seconds if part.seconds and training.seconds else None),
        ]
        for part in parts
    ]
    return section("Cost", hint, table("cost", columns, rows))


def configuration(history: RunHistory) -> str:
    """The settings that runs are most often compared by, all others, versions and restarts."""
    hint = "Versions, layout and device of each start of the run; its settings as resolved."
    content = _starts(history)
    rows = [[name, _values(history, paths)] for name, paths in SETTINGS.items()]
    rows += [["constraints", _constraints(history.setting("remix", "constraints"))]]
    content += table("settings", {"setting": "brief", "": ""}, [row for row in rows if row[1]])
    if history.config:
        dump = yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True)
        content += details("config.yaml, every field", text("pre", dump))
    return section("Configuration and versions", hint, content)


def _starts(history: RunHistory) -> str:
    columns = {"started": "brief", "iteration": "right", "ranks": "", "device": "", "versions": ""}
    rows = []
    for start in history.starts:
        layout = " × ".join(f"{name} {size}" for name, size in (start.get("layout") or {}).items())
        versions = start.get("versions") or {}
        rows.append(
            [
                clean(start.get("time", DASH)).replace("T", " "),
                f"{start.get('iteration', 0):,}",
                f"{start.get('world_size', DASH)} = {layout}" if layout else DASH,
                clean(start.get("device", DASH)),
                ", ".join(clean(f"{name} {version}") for name, version in versions.items()),
            ]
        )
    return table("starts", columns, rows) if rows else ""


def _values(history: RunHistory, paths: tuple[str, ...]) -> str:
    found = [history.setting(*path.split(".")) for path in paths]
    return " / ".join(clean(value) for value in found if value is not None)


def _constraints(constraints: Any) -> str:
    """Those that do something."""
    if not isinstance(constraints, dict):
        return ""
    found = {
        name: value
        for name, value in constraints.items()
        if value not in (None, False, {}, [], NO_BOUND.get(name))
    }
    return "; ".join(clean(f"{name} {value}") for name, value in found.items())
