"""The answers of :mod:`megatron_tikmix.monitoring.answers` as tables for the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tikmix.decision.explain import Explanation
from megatron_tikmix.monitoring.answers import Answer
from megatron_tikmix.monitoring.words import (
    DASH,
    Influence,
    Move,
    clean,
    count,
    moves,
    number,
    percent,
    shorten,
    signed,
    with_error,
)

POINTS = ["of the change, points"]
MOST_STAGES = 8
"""Of more stages, `mixture` shows the first and the last ones."""


def show_summary(answer: Answer, console: Console) -> None:
    _say(console, answer["words"])
    rows = []
    for boundary in answer["boundaries"]:
        moved = [Move(m["domain"], m["before"], m["after"]) for m in boundary["largest_moves"]]
        noise = boundary["total_variation_noise"]
        rows.append(
            [
                str(boundary["stage"]),
                f"{boundary['iteration']:,}",
                clean(boundary["source"] or DASH),
                number(boundary["total_variation"]),
                number(noise),
                "; ".join(move.in_words() for move in moved) or DASH,
            ]
        )
    if rows:
        heads = ["stage", "iteration", "source", "moved", "noise", "largest moves"]
        console.print(_table(heads, rows, words={"source", "largest moves"}))
    for boundary in answer["boundaries"][-1:]:
        _say(console, f"Stage {boundary['stage']}: {boundary['reason']} {boundary['cost']}")


def show_mixture(answer: Answer, console: Console) -> None:
    shown = list(range(len(answer["stages"])))
    if len(shown) > MOST_STAGES:
        shown = [0, *shown[1 - MOST_STAGES :]]
    heads = [f"stage {answer['stages'][k]}" for k in shown]
    rows = [
        [
            clean(row["domain"]),
            *(percent(row["weights"][k], 2) for k in shown),
            count(row["samples"] if row["tokens"] is None else row["tokens"]),
            number(row["epochs"], 2),
        ]
        for row in answer["domains"]
    ]
    amount = "samples" if answer["domains"][0]["tokens"] is None else "tokens"
    console.print(_table(["domain", *heads, amount, "epochs"], rows, words={"domain"}))
    if len(shown) < len(answer["stages"]):
        _say(console, f"{len(answer['stages'])} stages; --json has all of them.")


def show_influence(answer: Answer, console: Console) -> None:
    """A line a domain, a column a task."""
    where = f"before stage {answer['stage']}, iteration {answer['iteration']:,}"
    curvature = f", curvature {answer['curvature']}" if answer["curvature"] else ""
    _say(
        console,
        f"Influence {where}{curvature}, over each task's largest: positive lowers the loss, ± is "
        f"one standard error, · is within two of them from zero.",
    )
    tasks = answer["tasks"]
    scales = [
        max((abs(c["influence"] or 0.0) for c in task["domains"].values()), default=0.0) or 1.0
        for task in tasks
    ]
    rows = [
        [
            clean(domain),
            *(_cell(t["domains"][domain], s) for t, s in zip(tasks, scales, strict=True)),
        ]
        for domain in tasks[0]["domains"]
    ]
    heads = ["domain", *(shorten(task["task"], 14) for task in tasks)]
    console.print(_table(heads, rows, words={"domain"}))


def _cell(entry: Answer, scale: float) -> str:
    if entry["influence"] is None:
        return DASH
    error = entry["standard_error"]
    cell = with_error(entry["influence"] / scale, float("nan") if error is None else error / scale)
    return f"{cell} ·" if entry["within_noise"] else f"{cell}  "


def show_why(found: Explanation, console: Console) -> None:
    name = clean(found.domain)
    _say(
        console,
        f"{name}, stage {found.stage} after iteration {found.iteration:,}: "
        f"{percent(found.before)} → {percent(found.after)} ({found.source}); the solver's answer "
        f"was {percent(found.solved)}.",
    )
    console.print(
        _table(["what pushes the weight (up: +)", "push", *POINTS], _parts(found), words=set())
    )
    held = ", ".join(map(clean, found.active_constraints)) or "none"
    _say(console, f"Constraints that bind here: {held}.")
    moved, noise = number(found.total_variation), number(found.total_variation_noise)
    _say(console, f"The mixture moved by {moved} (noise of the answer {noise}): {found.reason}.")
    if found.note:
        _say(console, f"Note: {found.note}.")


def _parts(found: Explanation) -> list[list[str]]:
    """A line a part: what it pushes, and what it has made of the change, in points."""
    change = found.change
    gains = change.gain if change else dict.fromkeys(found.gain)
    rows: list[tuple[str, float | None, float | None]] = [
        *((f"gain on {clean(task)}", push, gains[task]) for task, push in found.gain.items()),
        ("uniformity over tasks", found.uniformity, change.uniformity if change else None),
        ("diversity", found.diversity, change.diversity if change else None),
        ("active constraints", found.constraints, change.constraints if change else None),
        ("all domains alike", None, change.shared if change else None),
        ("sum", _sum(found), change.total if change else None),
    ]
    noise = change.noise if change else None
    return [
        *([name, signed(push, 3), _points(part)] for name, push, part in rows),
        ["noise of gain and uniformity (±)", number(found.noise, 3), _points(noise).lstrip("+")],
    ]


def _points(part: float | None) -> str:
    return signed(None if part is None else 100 * part)


def _sum(found: Explanation) -> float | None:
    terms = [*found.gain.values(), found.uniformity, found.diversity, found.constraints]
    known = [term for term in terms if term is not None]
    return sum(known) if len(known) == len(terms) else None


def show_compare(answer: Answer, names: Sequence[str], console: Console) -> None:
    _say(console, f"A = {clean(names[0])}, B = {clean(names[1])}; differences are B − A.")
    if not answer["losses"]:
        _say(console, "The runs were never evaluated after the same number of samples.")
    for losses in answer["losses"][-1:]:
        spent = losses["tokens"]
        after = f"{losses['samples']:,} samples" if spent is None else f"{count(spent)} tokens"
        _say(console, f"Task losses after {after}, the last point that both were evaluated at:")
        rows = [
            [
                clean(task),
                number(entry["first"], 4),
                number(entry["second"], 4),
                signed(entry["difference"], 4),
            ]
            for task, entry in losses["tasks"].items()
        ]
        console.print(_table(["task", "A", "B", "B − A"], rows, words={"task"}))
    rows = [
        [
            clean(row["domain"]),
            percent(row["first"]),
            percent(row["second"]),
            signed(100 * (row["second"] - row["first"]), 1),
        ]
        for row in answer["weights"]
    ]
    _say(console, f"Last mixtures, {number(answer['total_variation'])} apart (total variation):")
    console.print(_table(["domain", "A", "B", "points"], rows, words={"domain"}))
    shares = " and ".join(percent(share) for share in answer["probe_token_share"])
    _say(console, f"Probes took {shares} of all tokens processed.")
    if answer["settings"]:
        rows = [
            [row["setting"], clean(row["first"]), clean(row["second"])]
            for row in answer["settings"]
        ]
        console.print(_table(["setting that differs", "A", "B"], rows, words={"A", "B"}))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: set[str]) -> Table:
    """Columns of `words` may be folded; the others are numbers and stay whole."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for index, head in enumerate(heads):
        textual = head in words or index == 0
        table.add_column(
            Text(head),
            justify="left" if textual else "right",
            no_wrap=not textual,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False)


# A boundary as a table for the terminal: every domain's weight, its influence, its tokens.


MOST_DOMAINS = 20
NARROWEST_DOMAIN, WIDEST_TASK = 10, 12

Column = tuple[str, list[str]]


def boundary_table(
    former_row: Mapping[str, Any] | None,
    row: Mapping[str, Any],
    domain_tokens: Mapping[str, float],
    width: int,
    most_tasks: int,
) -> Iterator[RenderableType]:
    """The table, a line on its units, and a line on what it leaves out."""
    former = former_row["weights"] if former_row else row["weights"]
    moved = moves(former, row["weights"])
    shown, left_out = moved[:MOST_DOMAINS], moved[MOST_DOMAINS:]
    influence = Influence.of(row, [move.domain for move in moved])
    measured, unit = _influence_columns(influence, len(shown), most_tasks)
    columns = [
        ("weight %", [_weight(move) for move in shown]),
        *measured,
        ("tokens", [count(domain_tokens.get(move.domain)) for move in shown]),
    ]
    yield _weights_table(
        f"stage {row['stage']}, after iteration {row['start_iteration']}",
        [clean(move.domain) for move in shown],
        columns,
        width,
    )
    if unit:
        yield Text(unit)
    if left_out:
        most = number(100 * abs(left_out[0].change), 2)
        yield Text(f"Not shown: {len(left_out)} domains that moved by at most {most} points.")


def _weights_table(title: str, domains: list[str], columns: list[Column], width: int) -> Table:
    """Numbers are never cut; the names get the room they leave."""
    gap = 1 if len(columns) > 7 else 2
    taken = sum(max(map(cell_len, [head, *cells])) + gap for head, cells in columns)
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, gap - 1, 0, 0),
    )
    room = max(NARROWEST_DOMAIN, width - taken)
    table.add_column("domain", no_wrap=True, overflow="ellipsis", max_width=room)
    for head, _ in columns:
        table.add_column(Text(head), justify="right", no_wrap=True)
    for i, domain in enumerate(domains):
        table.add_row(Text(domain), *(Text(cells[i]) for _, cells in columns))
    return table


def _influence_columns(
    influence: Influence | None, shown: int, most_tasks: int
) -> tuple[list[Column], str]:
    """Columns for the first `shown` domains, and what unit they are in.

    Of more than `most_tasks` tasks, only the mean is given.
    """
    if influence is None:
        return [], ""
    meaning = "positive lowers the loss, ± is one standard error."
    if len(influence.tasks) > most_tasks:
        mean_D, error_D = influence.relative().mean()
        unit = f"Mean over {len(influence.tasks)} tasks, each relative to its largest: {meaning}"
        return [("mean influence", _cells(mean_D[:shown], error_D[:shown]))], unit
    values_VD, errors_VD = influence.values_VD[:, :shown], influence.errors_VD[:, :shown]
    largest = np.nan_to_num(np.abs([values_VD, errors_VD])).max(initial=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    scale = 10.0**exponent
    columns = [
        (shorten(task, WIDEST_TASK), _cells(value_D / scale, error_D / scale))
        for task, value_D, error_D in zip(influence.tasks, values_VD, errors_VD, strict=True)
    ]
    return columns, f"Influence in units of 1e{exponent:+d}: {meaning}"


def _cells(values: np.ndarray, errors: np.ndarray) -> list[str]:
    pairs = zip(values, errors, strict=True)
    return [with_error(value, error, between="±") for value, error in pairs]


def _weight(move: Move) -> str:
    return f"{100 * move.before:.1f} → {100 * move.after:.1f}"
