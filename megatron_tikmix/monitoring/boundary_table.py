"""A boundary as a table for the terminal: every domain's weight, its influence, its tokens."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_tikmix.monitoring.decision import Influence, Move, moves
from megatron_tikmix.monitoring.formatting import clean, count, number, shorten, with_error

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
    yield _table(
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


def _table(title: str, domains: list[str], columns: list[Column], width: int) -> Table:
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
