"""The figures as tables: for the terminal, and as Markdown beside the JSON."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from claims.figures import Interval


class Tables:
    """Shows each table once it is there, and keeps it as Markdown."""

    def __init__(self) -> None:
        self._console = Console()
        self._markdown: list[str] = []

    def add(self, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=escape(title), title_justify="left")
        for number, heading in enumerate(headings):
            table.add_column(escape(heading), justify="left" if number == 0 else "right")
        for row in rows:
            table.add_row(*map(escape, row))
        self._console.print(table)
        lines = [
            f"### {title}",
            "",
            _line(headings),
            _line(["---"] + ["--:"] * (len(headings) - 1)),
        ]
        self._markdown.append("\n".join(lines + [_line(row) for row in rows]))

    def note(self, text: str) -> None:
        """A line under a table."""
        self._console.print(text, markup=False, highlight=False)
        self._markdown.append(text)

    @property
    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show_comparison(tables: Tables, rows: Sequence[dict[str, Any]], title: str) -> None:
    tables.add(
        title,
        [
            "policy",
            "loss",
            "less uniform's",
            "gap closed %",
            "tokens to uniform's loss %",
            "unseen tasks, less uniform's",
            "decision: FLOPs",
            "of a run's %",
        ],
        [
            [
                row["policy"],
                row["loss"].text(),
                row["difference"].text(sign=True),
                row["gap_closed"].text(100, 0),
                "not reached" if row["tokens"] is None else row["tokens"].text(100, 0),
                "" if row["unseen"] is None else row["unseen"].text(sign=True),
                f"{row['decision_flops']:.2g}",
                f"{100 * row['decision_share']:.0f}",
            ]
            for row in rows
        ],
    )


def show_ablation(tables: Tables, name: str, rows: Sequence[dict[str, Any]]) -> None:
    tables.add(
        f"Ablation: {name}",
        ["change", "loss less the default's", "gap closed %", "decision of a run's FLOPs %"],
        [
            [
                row["policy"],
                row["difference"].text(sign=True) if row["difference"] else "",
                row["gap_closed"].text(100, 0),
                f"{100 * row['decision_share']:.0f}",
            ]
            for row in rows
        ],
    )


def show_outcomes(tables: Tables, found: dict[str, Any]) -> None:
    def words(part: dict[str, float]) -> list[str]:
        return [f"{part['r']:.2f}", f"{part['low']:.2f} to {part['high']:.2f}", str(part["n"])]

    tables.add(
        "Influence against the final loss of whole runs",
        ["predictor", "r", "95 % interval", "mixtures"],
        [
            ["mean influence", *words(found["all"])],
            ["mean influence, without the junk-heavy", *words(found["without_junk_heavy"])],
            ["mean logarithm of influence", *words(found["log"])],
        ],
    )


def show_drift(tables: Tables, found: dict[str, Any]) -> None:
    tables.add(
        "Rank correlation of influence with the boundary before, and its ceiling",
        ["model", "final loss", *(str(row["iteration"]) for row in found["model"]["boundaries"])],
        [
            [
                name,
                f"{part['loss']:.3f}",
                *(
                    f"{row['correlation']:.2f} of {row['ceiling']:.2f}"
                    for row in part["boundaries"]
                ),
            ]
            for name, part in found.items()
        ],
    )


def plain(figures: Any) -> Any:
    """Figures as JSON holds them."""
    if isinstance(figures, Interval):
        return {"mean": figures.mean, "low": figures.low, "high": figures.high}
    if isinstance(figures, dict):
        return {key: plain(value) for key, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [plain(value) for value in figures]
    return figures
