"""report.html: what a run trained on, why, and what came of it, on one page that needs no network.

    python -m megatron_tikmix.monitoring.report RUN_DIR [--baseline RUN_DIR]

Made from the run directory alone, so it can be made while the run goes on, and on any machine.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring import heat_maps, pictures
from megatron_tikmix.monitoring.decision import moves, sentence, variation_in_words
from megatron_tikmix.monitoring.formatting import DASH, clean, count, number, percent, with_error
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.page import page, picture, section, table, text
from megatron_tikmix.monitoring.report_baseline import baseline
from megatron_tikmix.monitoring.report_reasons import reasons
from megatron_tikmix.monitoring.report_record import configuration, cost
from megatron_tikmix.monitoring.run_files import RunFiles
from megatron_tikmix.monitoring.summary import summary

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
        summary(title, history),
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
        prog="python -m megatron_tikmix.monitoring.report",
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
