"""report.html: what a run trained on, why, and with what effect, on one page without a network.

    tikmix report RUN_DIR [--baseline RUN_B]

It is made from the run directory alone, so it can be made during the run, and on any machine. The
page's text and style are in report.html.j2; this module provides the contents.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from megatron_tikmix.decision.explain import Change, Explainer, Explanation
from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring import figures
from megatron_tikmix.monitoring.answers import compare, in_words, open_run
from megatron_tikmix.monitoring.files import RunFiles
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.tables import Table, losses_table
from megatron_tikmix.monitoring.words import (
    DASH,
    Spent,
    clean,
    count,
    duration,
    moves,
    number,
    percent,
    sentence,
    shorten,
    signed,
    variation_in_words,
    with_error,
)

MOST_MOVES, LONGEST_NAME = 8, 26
"""The most domains whose change is explained at each boundary, and characters of their names."""

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
"""The settings that runs are most often compared by."""

NO_BOUND = {"lower": 0.0, "upper": 1.0, "pareto_slack": 0.0}
"""Constraints that hold for every mixture, at these values."""


def write_report(run_dir: str | Path, baseline_dir: str | Path | None = None) -> Path:
    """Write `run_dir/report.html`, replacing an older one in a single step; return its path.

    Args:
        baseline_dir: the run with whose task losses this one's are compared; None: the one that
            the run's configuration names as `baseline`, if any.

    Raises:
        InputError: a directory or file cannot be read.
    """
    run_dir = Path(run_dir)
    history = RunHistory(RunFiles(run_dir))
    page = _template().render(
        title=f"TiKMiX run: {clean(run_dir.resolve().name)}",
        words=in_words(history).replace(" %", "\N{NO-BREAK SPACE}%"),
        tiles=tiles(history),
        pictures=pictures(history),
        measured=len(history.measured),
        boundaries=boundaries(history),
        reasons=reasons(history),
        baseline=baseline(history, baseline_dir),
        cost=cost(history),
        mixture=mixture(history),
        starts=starts(history),
        settings=settings(history),
        configuration=history.config
        and yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True),
        plotly_script=get_plotlyjs(),
    )
    path = run_dir / "report.html"
    draft = path.with_name(f"report.html.{os.getpid()}")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)  # a reader sees the old page or the new one, never half of one
    return path


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("megatron_tikmix.monitoring", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plotly"] = _to_html
    return environment.get_template("report.html.j2")


def _to_html(figure: go.Figure, name: str) -> str:
    """Return a figure as HTML, as wide as the page, and as high as its layout says."""
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,  # once a page, in its head
        include_mathjax=False,
        div_id=name,
        default_height=f"{figure.layout.height}px",
        # A name such as `$x$` is a name, not a formula.
        config={"displayModeBar": False, "responsive": True, "typesetMath": False},
    )


def tiles(history: RunHistory) -> list[tuple[str, str]]:
    """Return the key figures at the head of the page, each with its description."""
    length = history.sequence_length
    means = [number(mean, 2) for mean in history.mean_task_loss.values()]
    return [
        (count(history.samples * (length or 1)), f"{'tokens' if length else 'samples'} trained on"),
        (str(len(history.stages)), f"stages of the mixture, {len(history.domains)} domains"),
        (" → ".join([means[0], *means[1:][-1:]]) if means else DASH, "mean task loss"),
        (percent(history.probe_token_share), "of all tokens went to the probe"),
        (percent(history.probe_time_share), "of the time went to the probe"),
    ]


def pictures(history: RunHistory) -> dict[str, go.Figure | None]:
    """Return the pictures by name; None where there is nothing to show yet."""
    stages = len(history.stages)
    known = history.metrics or history.task_losses
    crowded = figures.crowded(history)
    return {
        "weights": figures.weights_over_time(history) if stages else None,
        "changes": figures.largest_changes(history) if crowded and stages > 1 else None,
        "influence": figures.influence_maps(history) if history.measured else None,
        "losses": figures.task_losses(history) if known else None,
        "consumption": figures.tokens_and_epochs(history) if history.samples else None,
    }


def boundaries(history: RunHistory) -> Table:
    """Return what changed at each boundary, and why."""
    heads = ["stage", "iteration", "source", "reason", "total variation", "largest moves"]
    rows = []
    for former, row in zip([None, *history.stages], history.stages, strict=False):
        largest = moves(former.weights, row.weights)[:3] if former else []
        rows.append(
            [
                str(row.stage),
                f"{row.start_iteration:,}",
                clean(row.source or DASH),
                sentence(row.reason),
                variation_in_words(row),
                "; ".join(move.in_words() for move in largest if move.change) or DASH,
                number(row.probe_seconds, 1),
            ]
        )
    return Table([*heads, "probe (s)"], rows, words=(2, 3, 4, 5), unbroken=(2,))


def reasons(history: RunHistory) -> dict[int, Table]:
    """Return, for each solved stage, the reasons why the largest moves were made."""
    heads = ["domain", "weight (%)", "gain", "most from", "uniformity", "diversity"]
    heads += ["constraints", "all alike", "change", "noise (±)"]
    found = {}
    for former, row in zip(history.stages, history.stages[1:], strict=False):
        rows = [
            [
                shorten(each.domain, LONGEST_NAME),
                f"{100 * each.before:.1f} → {100 * each.solved:.1f}",
                *_parts(each.change, each.solved - each.before),
            ]
            for each in _explained(former, row)
        ]
        if rows:
            stage, iteration = row.stage, f"{row.start_iteration:,}"
            title = f"Stage {stage}, iteration {iteration}: what moved the domains that moved most"
            found[stage] = Table(heads, rows, words=(0, 3), unbroken=(0,), title=title)
    return found


def _explained(former: StageRow, row: StageRow) -> list[Explanation]:
    """Explain the solution's largest moves; empty if the row lacks the details."""
    if row.solution is None or row.objective() is None:
        return []
    explainer = Explainer(former, row)
    largest = [move.domain for move in moves(former.weights, row.solution.mixture) if move.change]
    return [explainer.of(name) for name in largest[:MOST_MOVES]]


def _parts(change: Change | None, total: float) -> list[str]:
    """Return the parts of a change in points; only the change if they do not add up to it."""
    if change is None or change.search:  # what TiKMiX-M measured is in no column
        return [DASH] * 6 + [signed(100 * total), DASH]
    most = max(change.gain, key=lambda task: abs(change.gain[task]))
    parts = (change.uniformity, change.diversity, change.constraints, change.shared, change.total)
    return [
        signed(100 * sum(change.gain.values())),
        f"{shorten(most, LONGEST_NAME)} {signed(100 * change.gain[most])}",
        *(signed(100 * part) for part in parts),
        number(None if change.noise is None else 100 * change.noise, 2),
    ]


@dataclass(frozen=True)
class Baseline:
    """The comparison with another run's task losses, as the page shows it.

    Attributes:
        name: the other run's name.
        problem: why they cannot be compared; empty if there is no problem.
        shares: the share of tokens that probes took in this run, and in the other.
        picture, losses: differences at all common points, and losses at the last; None if there
            are none.
    """

    name: str
    problem: str = ""
    shares: Sequence[str] = ()
    picture: go.Figure | None = None
    losses: Table | None = None


def baseline(history: RunHistory, baseline_dir: str | Path | None) -> Baseline | None:
    """Compare task losses after equally many samples; return None without a baseline.

    Raises:
        InputError: the given directory holds no run. If only the configuration names it, the page
            says that it is missing.
    """
    named = baseline_dir or history.setting("baseline")
    if not named:
        return None
    name = clean(Path(named).name)
    try:
        other = open_run(str(named))
    except InputError as error:
        if baseline_dir:
            raise
        return Baseline(name, problem=str(error))
    answer = compare(other, history)  # differences: this run less the baseline
    shares = [percent(share) for share in reversed(answer["probe_token_share"])]
    points = [row for row in answer["losses"] if row["tasks"]]
    if not points:
        return Baseline(name, shares=shares)
    unit = "samples" if points[-1]["tokens"] is None else "tokens"
    columns = {"this run": "second", "baseline": "first", "difference": "difference"}
    return Baseline(
        name,
        shares=shares,
        picture=figures.baseline_differences(points),
        losses=losses_table(
            points[-1]["tasks"], f"after {count(points[-1][unit])} {unit}", columns
        ),
    )


def cost(history: RunHistory) -> Table:
    """Return the cost of training and of each part of deciding."""
    trained = int(history.samples * (history.sequence_length or 0))
    training = Spent("training", trained, 0, history.training_seconds or None)
    rows = [
        [
            part.kind,
            count(part.tokens) if trained else DASH,
            percent(part.compute / training.compute if trained else None),
            duration(part.seconds),
            percent(part.seconds / training.seconds if part.seconds and training.seconds else None),
        ]
        for part in [training, *history.spent]
    ]
    return Table(["", "tokens", "compute, of training's", "time", "time, of training's"], rows)


def mixture(history: RunHistory) -> Table:
    """Return a row for every domain, with its first and last weight."""
    amount = "tokens" if history.sequence_length else "samples"
    caps_D = history.epoch_caps_D
    capped = ["cap"] if np.isfinite(caps_D).any() else []
    heads = ["domain", "first weight", "last weight", amount, "epochs", *capped, "mean influence"]
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
    return Table(heads, rows)


def starts(history: RunHistory) -> Table:
    """Return layout, device and versions of each start of the run."""
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
    heads = ["started", "iteration", "ranks", "device", "versions"]
    return Table(heads, rows, words=(0, 2, 3, 4), unbroken=(0,))


def settings(history: RunHistory) -> Table:
    """Return the settings that runs are most often compared by."""
    rows = []
    for name, paths in SETTINGS.items():
        values = [history.setting(*path.split(".")) for path in paths]
        rows.append([name, " / ".join(clean(value) for value in values if value is not None)])
    rows.append(["constraints", _constraints(history.setting("remix", "constraints"))])
    return Table(["setting", ""], [row for row in rows if row[1]], words=(0, 1), unbroken=(0,))


def _constraints(constraints: Any) -> str:
    """Return the constraints that can bind, with their values."""
    if not isinstance(constraints, dict):
        return ""
    found = {
        name: value
        for name, value in constraints.items()
        if value not in (None, False, {}, [], NO_BOUND.get(name))
    }
    return "; ".join(clean(f"{name} {value}") for name, value in found.items())
