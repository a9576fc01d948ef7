"""The one Table, as rich renders it: words may be wrapped, names cut, numbers neither."""

import io
import re

import pytest
from rich.console import Console

from megatron_tikmix.monitoring.tables import Table, losses_table

HEADS = ["domain", "weight", "reason"]
ROWS = [["a_name_of_thirty_letters_in_all", "12.345 %", "[b]why[/b] not so"], ["b", "1 %", "–"]]


def rendered(table, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("unbroken", [(), (0,)])
def test_numbers_are_whole_where_words_must_give_way(unbroken):
    table = Table(HEADS, ROWS, words=(0, 2), unbroken=unbroken)
    assert len(rendered(table, 80)) == 4  # heads, a rule, and a line for each row
    lines = rendered(table, 40)
    assert max(map(len, lines)) <= 40
    text = "\n".join(lines)
    assert re.search(r"12\.345 %", text)
    assert "[b]why[/b]" in text
    assert ("…" in text) == bool(unbroken)


def test_what_fits_is_what_is_shown_whole():
    numbers = Table(["domain", "t", "u"], [["a" * 30, "1.25", "-0.5"]], unbroken=(0,))
    widths = [width for width in range(5, 60) if numbers.fits(width)]
    shown = [
        width for width in range(5, 60) if re.search(r"1\.25 +-0\.5$", rendered(numbers, width)[-1])
    ]
    assert widths == shown
    assert widths[0] == 10 + 2 + 4 + 2 + 4


def test_columns_of_one_name_stay_apart():
    (heads, _, row) = rendered(Table(["t", "t", "t"], [["a", "1", "2"]]), 40)
    assert heads.split() == ["t", "t", "t"]
    assert row.split() == ["a", "1", "2"]


def test_the_mean_over_tasks_is_that_of_each_column():
    losses = {
        "t": {"first": 2.0, "second": 3.0, "difference": 1.0},
        "mean over tasks": {"first": 1.0, "second": 1.5, "difference": 0.5},  # a name like another
    }
    table = losses_table(losses, "task", {"B": "second", "A": "first", "B − A": "difference"})
    assert table.heads == ["task", "B", "A", "B − A"]
    assert [row[1:] for row in table.rows] == [
        ["3.0000", "2.0000", "+1.0000"],
        ["1.5000", "1.0000", "+0.5000"],
        ["2.2500", "1.5000", "+0.7500"],
    ]
    del losses["mean over tasks"]
    assert len(losses_table(losses, "task", {"A": "first"}).rows) == 1
