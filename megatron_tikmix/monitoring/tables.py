"""Tables: the `Table` that rich and report.html render, and the tables on the terminal.

`boundary_table` is printed at each boundary of a run; the `show_` functions print the answers of
:mod:`megatron_tikmix.monitoring.answers`. Tables that only report.html has are made in
:mod:`megatron_tikmix.monitoring.report`.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich import table as rich_table
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from megatron_tikmix.decision.explain import Explanation
from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.monitoring.answers import Answer
from megatron_tikmix.monitoring.words import (
    DASH,
    Array,
    Influence,
    Move,
    clean,
    count,
    mean_loss,
    moves,
    number,
    percent,
    shorten,
    signed,
    with_error,
)

FEW_COLUMNS = 8
"""More columns than this are one space apart on the terminal instead of two."""
NARROWEST = 10
"""Names are cut to no fewer characters than this on a narrow terminal."""
MOST_STAGES = 8
"""The most stages for which `show_mixture` has columns: the first and the last ones of more."""
MOST_DOMAINS = 20
"""The most domains for which `boundary_table` has rows: those that moved most."""
LONGEST_TASK = 12
"""The most characters of a task's name above a column of `boundary_table`."""

Column = tuple[str, list[str]]
"""A head and the cells below it."""


@dataclass(frozen=True)
class Table:
    """A table of plain text, for rich and for the macro `table` of report.html.j2.

    Attributes:
        heads: the head of each column.
        rows: lines of cells, one cell under each head.
        words: positions of the columns of words, flush left and wrapped if necessary. All others
            are numbers, flush right and never wrapped.
        unbroken: positions of columns of words that are not wrapped; a narrow terminal cuts them,
            down to `NARROWEST` characters.
        title: a line above the table.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Collection[int] = (0,)
    unbroken: Collection[int] = ()
    title: str = ""

    def fits(self, width: int) -> bool:
        """Return whether a terminal of `width` columns has room for every number."""
        cut = [
            min(column, NARROWEST) if place in self.unbroken else column
            for place, column in enumerate(self._widths)
        ]
        return sum(cut) + self._gap * (len(cut) - 1) <= width

    @property
    def _widths(self) -> list[int]:
        lines = [self.heads, *self.rows]
        return [max(cell_len(line[place]) for line in lines) for place in range(len(self.heads))]

    @property
    def _gap(self) -> int:
        return 2 if len(self.heads) <= FEW_COLUMNS else 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        grid = rich_table.Table(
            title=Text(self.title, style="table.title") if self.title else None,
            title_justify="left",
            box=SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, self._gap - 1, 0, 0),  # and one that the box puts between columns
        )
        widths = self._widths
        missing = max(0, sum(widths) + self._gap * (len(widths) - 1) - options.max_width)
        for place, (head, width) in enumerate(zip(self.heads, widths, strict=True)):
            wrapped = place in self.words and place not in self.unbroken
            grid.add_column(
                Text(head),
                justify="left" if place in self.words else "right",
                no_wrap=not wrapped,
                overflow="fold" if wrapped else "ellipsis",
                max_width=max(NARROWEST, width - missing) if place in self.unbroken else None,
            )
        for row in self.rows:
            grid.add_row(*map(Text, row))
        yield grid


def boundary_table(
    former_row: StageRow | None,
    row: StageRow,
    domain_tokens: Mapping[str, float],
    width: int,
    most_tasks: int,
) -> Iterator[RenderableType]:
    """Yield a table of weights, influence and tokens of each domain, and lines that explain it.

    Args:
        former_row: the ledger's row of the stage before, or None.
        row: the ledger's row of the stage that begins.
        width: columns of the terminal. Without room for influence on each task, its mean is shown.
        most_tasks: with more tasks, the mean is shown too.
    """
    former = former_row.weights if former_row else row.weights
    moved = moves(former, row.weights)
    shown, left_out = moved[:MOST_DOMAINS], moved[MOST_DOMAINS:]
    influence = Influence.of(row, [move.domain for move in moved])

    def with_influence(measured: Sequence[Column]) -> Table:
        columns = [
            ("domain", [clean(move.domain) for move in shown]),
            ("weight %", [f"{100 * move.before:.1f} → {100 * move.after:.1f}" for move in shown]),
            *measured,
            ("tokens", [count(domain_tokens.get(move.domain)) for move in shown]),
        ]
        heads, cells = zip(*columns, strict=True)
        title = f"stage {row.stage}, after iteration {row.start_iteration}"
        return Table(heads, list(zip(*cells, strict=True)), unbroken=(0,), title=title)

    if influence is None:
        yield with_influence([])
    else:
        columns, unit = _influence_by_task(influence, len(shown))
        table = with_influence(columns)
        if len(influence.tasks) > most_tasks or not table.fits(width):
            columns, unit = _mean_influence(influence, len(shown))
            table = with_influence(columns)
        yield table
        yield Text(f"{unit}: positive lowers the loss, ± is one standard error.")
    if left_out:
        most = number(100 * abs(left_out[0].change), 2)
        yield Text(f"Not shown: {len(left_out)} domains that moved by at most {most} points.")


def _influence_by_task(influence: Influence, shown: int) -> tuple[list[Column], str]:
    """Return a column for each task, of the first `shown` domains, and their unit."""
    values_VD, errors_VD = influence.values_VD[:, :shown], influence.errors_VD[:, :shown]
    largest = np.nan_to_num(np.abs([values_VD, errors_VD])).max(initial=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    scale = 10.0**exponent
    columns = [
        (shorten(task, LONGEST_TASK), _measurements(value_D / scale, error_D / scale))
        for task, value_D, error_D in zip(influence.tasks, values_VD, errors_VD, strict=True)
    ]
    return columns, f"Influence in units of 1e{exponent:+d}"


def _mean_influence(influence: Influence, shown: int) -> tuple[list[Column], str]:
    """Return a column for the mean over tasks, of the first `shown` domains, and its unit."""
    mean_D, error_D = influence.relative().mean()
    column = ("mean influence", _measurements(mean_D[:shown], error_D[:shown]))
    return [column], f"Mean over {len(influence.tasks)} tasks, each relative to its largest"


def _measurements(values_D: Array, errors_D: Array) -> list[str]:
    pairs = zip(values_D, errors_D, strict=True)
    return [with_error(value, error, between="±") for value, error in pairs]


def losses_table(task_losses: Mapping[str, Answer], head: str, columns: Mapping[str, str]) -> Table:
    """Return the task losses of two runs, and their mean where there are several tasks.

    Args:
        task_losses: `tasks` of one of the `losses` that :func:`answers.compare` returns.
        head: the head of the column of tasks.
        columns: the part of an entry ("first", "second" or "difference") in each column, by head.
    """
    lines = [(clean(task), entry) for task, entry in task_losses.items()]
    if len(lines) > 1:
        first, second = (
            mean_loss({task: entry[run] for task, entry in task_losses.items()})
            for run in ("first", "second")
        )
        mean = {"first": first, "second": second, "difference": second - first}
        lines.append(("mean over tasks", mean))
    written = {"first": number, "second": number, "difference": signed}
    rows = [
        [task, *(written[shown](entry[shown], 4) for shown in columns.values())]
        for task, entry in lines
    ]
    return Table([head, *columns], rows)


def show_summary(answer: Answer, console: Console) -> None:
    """Print the run in words, a line for each boundary, and the reason for the last one."""
    _say(console, answer["words"])
    rows = []
    for boundary in answer["boundaries"]:
        moved = [Move(m["domain"], m["before"], m["after"]) for m in boundary["largest_moves"]]
        rows.append(
            [
                str(boundary["stage"]),
                f"{boundary['iteration']:,}",
                clean(boundary["source"] or DASH),
                number(boundary["total_variation"]),
                number(boundary["total_variation_noise"]),
                "; ".join(move.in_words() for move in moved) or DASH,
            ]
        )
    if rows:
        heads = ["stage", "iteration", "source", "moved", "noise", "largest moves"]
        console.print(Table(heads, rows, words=(0, 2, 5)))
    for boundary in answer["boundaries"][-1:]:
        _say(console, f"Stage {boundary['stage']}: {boundary['reason']} {boundary['cost']}")


def show_mixture(answer: Answer, console: Console) -> None:
    """Print every domain's weight in each stage, and what was drawn from it."""
    shown = list(range(len(answer["stages"])))
    if len(shown) > MOST_STAGES:
        shown = [0, *shown[1 - MOST_STAGES :]]
    amount = "samples" if answer["domains"][0]["tokens"] is None else "tokens"
    heads = ["domain", *(f"stage {answer['stages'][k]}" for k in shown), amount, "epochs"]
    rows = [
        [
            clean(row["domain"]),
            *(percent(row["weights"][k], 2) for k in shown),
            count(row[amount]),
            number(row["epochs"], 2),
        ]
        for row in answer["domains"]
    ]
    console.print(Table(heads, rows))
    if len(shown) < len(answer["stages"]):
        _say(console, f"{len(answer['stages'])} stages; --json has all of them.")


def show_influence(answer: Answer, console: Console) -> None:
    """Print the matrix: a line for each domain, a column for each task."""
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
            *(
                _relative(task["domains"][domain], scale)
                for task, scale in zip(tasks, scales, strict=True)
            ),
        ]
        for domain in tasks[0]["domains"]
    ]
    console.print(Table(["domain", *(shorten(task["task"], 14) for task in tasks)], rows))


def _relative(entry: Answer, scale: float) -> str:
    if entry["influence"] is None:
        return DASH
    error = math.nan if entry["standard_error"] is None else entry["standard_error"]
    mark = " ·" if entry["within_noise"] else "  "
    return with_error(entry["influence"] / scale, error / scale) + mark


def show_why(found: Explanation, console: Console) -> None:
    """Print what pushed a domain's weight, and how much of the change is due to each push."""
    name = clean(found.domain)
    _say(
        console,
        f"{name}, stage {found.stage} after iteration {found.iteration:,}: "
        f"{percent(found.before)} → {percent(found.after)} ({found.source}); the solver's answer "
        f"was {percent(found.solved)}.",
    )
    heads = ["what pushes the weight (up: +)", "push", "of the change, points"]
    console.print(Table(heads, _pushes(found)))
    active = ", ".join(map(clean, found.active_constraints)) or "none"
    _say(console, f"Constraints that bind here: {active}.")
    moved, noise = number(found.total_variation), number(found.total_variation_noise)
    _say(console, f"The mixture moved by {moved} (noise of the answer {noise}): {found.reason}.")
    if found.note:
        _say(console, f"Note: {found.note}.")


def _pushes(found: Explanation) -> list[list[str]]:
    """Return a row for each part: its push, and its part of the change, in points."""
    change = found.change
    search = change.search if change else 0.0
    gains = change.gain if change else dict.fromkeys(found.gain)
    rows: list[tuple[str, float | None, float | None]] = [
        *((f"gain on {clean(task)}", push, gains[task]) for task, push in found.gain.items()),
        ("uniformity over tasks", found.uniformity, change.uniformity if change else None),
        ("diversity", found.diversity, change.diversity if change else None),
        ("active constraints", found.constraints, change.constraints if change else None),
        ("all domains alike", found.shared, change.shared if change else None),
        *([("outcomes that TiKMiX-M measured", None, search)] if search else []),
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
    if found.constraints is None or found.shared is None:
        return None
    terms = [*found.gain.values(), found.uniformity, found.diversity]
    return sum([*terms, found.constraints, found.shared])


def show_compare(answer: Answer, names: Sequence[str], console: Console) -> None:
    """Print the last losses, the last mixtures, the cost and the settings of two runs, A and B."""
    _say(console, f"A = {clean(names[0])}, B = {clean(names[1])}; differences are B − A.")
    if not answer["losses"]:
        _say(console, "The runs were never evaluated after the same number of samples.")
    for losses in answer["losses"][-1:]:
        tokens = losses["tokens"]
        after = f"{losses['samples']:,} samples" if tokens is None else f"{count(tokens)} tokens"
        _say(console, f"Task losses after {after}, the last point that both were evaluated at:")
        columns = {"A": "first", "B": "second", "B − A": "difference"}
        console.print(losses_table(losses["tasks"], "task", columns))
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
    console.print(Table(["domain", "A", "B", "points"], rows))
    shares = " and ".join(percent(share) for share in answer["probe_token_share"])
    _say(console, f"Probes took {shares} of all tokens processed.")
    if answer["settings"]:
        rows = [
            [row["setting"], clean(row["first"]), clean(row["second"])]
            for row in answer["settings"]
        ]
        console.print(Table(["setting that differs", "A", "B"], rows, words=(0, 1, 2)))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, emoji=False)
