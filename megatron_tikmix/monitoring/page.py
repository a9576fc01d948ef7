"""The bare bones of a self-contained HTML page: escaped text and tables, figures, a style sheet.

What goes into a page is escaped here and nowhere else: callers hand over plain text and figures.
"""

import html
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

TALL = 1100
"""Pixels above which a picture or table scrolls in a frame of its own. On paper none does."""

STYLE = """
:root { --ink: #22262e; --faint: #6b7280; --rule: #e3e6ea; --tint: #f6f7f9; }
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1080px; padding: 40px 32px 64px; color: var(--ink); background: white;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 48px 0 2px; }
p { margin: 6px 0; max-width: 92ch; overflow-wrap: anywhere; }
.lead { font-size: 17px; }
.hint { color: var(--faint); font-size: 14px; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(155px, 1fr)); gap: 12px;
  margin: 20px 0 8px;
}
.tile { background: var(--tint); border: 1px solid var(--rule); border-radius: 8px; }
.tile { padding: 12px 14px; line-height: 1.35; }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: 13px; }
.frame { margin-top: 12px; overflow-x: auto; }
.frame.tall {
  max-height: 860px; overflow-y: auto; border: 1px solid var(--rule); border-radius: 8px;
}
table { border-collapse: collapse; width: 100%; min-width: 800px; font-size: 14px; }
th, td { padding: 6px 10px; text-align: left; font-variant-numeric: tabular-nums; }
th {
  color: var(--faint); font-weight: 600; vertical-align: bottom; background: white;
  position: sticky; top: 0; box-shadow: inset 0 -2px var(--rule);
}
td { border-bottom: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
.right { text-align: right; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--faint); font-size: 14px; overflow-wrap: anywhere; }
h3 { font-size: 15px; margin: 22px 0 0; overflow-wrap: anywhere; }
pre {
  background: var(--tint); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px;
  max-height: 480px; overflow: auto; font-size: 12.5px; line-height: 1.45;
}
td.right, td.brief { white-space: nowrap; overflow-wrap: normal; }
@media print {
  body { max-width: none; padding: 0; font-size: 13px; }
  .frame, .frame.tall { max-height: none; overflow: visible; border: 0; }
  table { min-width: 0; }
  th { position: static; }
  .tiles { grid-template-columns: repeat(5, 1fr); }
  h2, .hint { break-after: avoid; }
  p, tr, .frame:not(.tall) .plotly-graph-div { break-inside: avoid; }
}
"""

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

# Paper is narrower than most windows, and plotly looks at its width only when told to.
FIT_TO_PAPER = """
const pictures = document.getElementsByClassName("plotly-graph-div");
const fit = () => Array.from(pictures).forEach((picture) => Plotly.Plots.resize(picture));
window.matchMedia("print").addEventListener("change", fit);
"""


def text(tag: str, content: str, css: str = "") -> str:
    """One element of plain text."""
    attribute = f' class="{css}"' if css else ""
    return f"<{tag}{attribute}>{html.escape(content)}</{tag}>"


def tiles(figures: Iterable[tuple[str, str]]) -> str:
    """A row of (figure, what it is)."""
    boxes = [f'<div class="tile">{text("b", n)}{text("span", of)}</div>' for n, of in figures]
    return f'<div class="tiles">{"".join(boxes)}</div>'


def table(name: str, columns: dict[str, str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text. `columns` maps each head to its class: "right", "brief" or ""."""

    def line(tag: str, cells: Iterable[str]) -> str:
        line = zip(cells, columns.values(), strict=True)
        return f"<tr>{''.join(text(tag, cell, css) for cell, css in line)}</tr>"

    head, body = line("th", columns), "".join(line("td", row) for row in rows)
    content = f'<table id="{name}"><thead>{head}</thead><tbody>{body}</tbody></table>'
    return _frame(content, tall=37 * len(rows) > TALL)


def picture(name: str, figure: go.Figure) -> str:
    """A figure as wide as the page, and as high as its layout says."""
    content = figure.to_html(
        full_html=False,
        include_plotlyjs=False,  # once a page, in its head
        include_mathjax=False,
        div_id=name,
        default_height=f"{figure.layout.height}px",
        # A name such as `$x$` is a name, not a formula.
        config={"displayModeBar": False, "responsive": True, "typesetMath": False},
    )
    return _frame(content, tall=figure.layout.height > TALL)


def details(title: str, content: str) -> str:
    """Content that is shown when its title is clicked on."""
    return f"<details>{text('summary', title)}{content}</details>"


def section(title: str, hint: str, content: str) -> str:
    """A titled part of the page, with a line that says how to read it."""
    return f"<section>{text('h2', title)}{text('p', hint, 'hint')}{content}</section>"


def page(title: str, body: str) -> str:
    """The whole document. It fetches nothing: scripts and styles are inside, and its policy tells
    browsers to refuse whatever else it might ask for."""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"{text('title', title)}<style>{STYLE}</style><script>{get_plotlyjs()}</script></head>"
        f"<body>{body}<script>{FIT_TO_PAPER}</script></body></html>"
    )


def _frame(content: str, tall: bool) -> str:
    return f'<div class="frame{" tall" if tall else ""}">{content}</div>'
