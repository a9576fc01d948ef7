"""What the influence probe is worth: its speed, its errors, and what it says of training.

Everything starts from one small model, trained as any run is (benchmarks/influence.yaml), on text
that benchmarks/corpus.py fetches out of packages. Each part prints a table:

  train        the text and the model alone, some minutes; every other part sees to it too
  throughput   tokens/s of a probe against a training step's, in both data-parallel modes
  additivity   a mixture's influence against the weighted sum of its domains', 254 mixtures
  error_bars   how often the 95% intervals hold the large-sample value, over 200 probes
  budget       distance to the large-sample decision against tokens, adaptive and fixed budgets
  kronfluence  the same matrix by kronfluence: agreement, time, peak memory (extra: benchmarks)
  realised     predicted influence against the loss drop of real continuations

additivity, error_bars and budget draw from one large bank, 7.4 M tokens, which is measured once.
All that is measured is kept under --work as soon as it is there: a benchmark that was stopped goes
on where it was, and figures of a finished part are shown again; --fresh measures them anew (the
model and its banks are kept; delete the folder for new ones).
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

for module in ("megatron", "torch"):  # their notes on optional packages; before they are imported
    warnings.filterwarnings("ignore", module=rf"{module}\..*")

from influence_parts import (  # noqa: E402
    additivity,
    budget,
    error_bars,
    kronfluence_scores,
    realised,
    throughput,
)
from influence_parts.trained import Settings, train, write_json  # noqa: E402
from rich.console import Console  # noqa: E402

from megatron_tikmix.errors import InputError  # noqa: E402

# realised shows kronfluence's matrix too, if there is one.
PARTS: dict[str, Any] = {
    "throughput": throughput,
    "additivity": additivity,
    "error_bars": error_bars,
    "budget": budget,
    "kronfluence": kronfluence_scores,
    "realised": realised,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="""\
examples:
  python benchmarks/influence.py                           everything, the best part of an hour
  python benchmarks/influence.py throughput --fresh --check
  python benchmarks/influence.py error_bars budget --json figures.json
""",
    )
    add = parser.add_argument
    add(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"train, {', '.join(PARTS)} (default: all of them)",
    )
    add("--check", action="store_true", help="exit 1 if a figure misses its target")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--fresh", action="store_true", help="measure the parts again, whatever is kept")
    add(
        "--data",
        type=Path,
        default=Path("runs/benchmarks/data"),
        metavar="DIR",
        help="the text, as benchmarks/corpus.py writes it (default: runs/benchmarks/data)",
    )
    add(
        "--work",
        type=Path,
        default=Path("runs/benchmarks/influence"),
        metavar="DIR",
        help="the model, banks and figures (default: runs/benchmarks/influence)",
    )
    add("--on_ranks", type=Path, help=argparse.SUPPRESS)  # throughput's own ranks
    return parser


def figures_of(part: str, settings: Settings, fresh: bool) -> dict[str, Any]:
    """Kept ones, or measured now and kept."""
    path = settings.work / f"{part}.json"
    if path.is_file() and not fresh:
        settings.say(f"{part}: kept figures from {path}; --fresh measures them again")
    else:
        settings.say(f"{part} …")
        write_json(path, PARTS[part].measure(settings))
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def run(options: argparse.Namespace) -> int:
    settings = Settings(options.data, options.work)
    if options.on_ranks:
        throughput.on_ranks(settings, options.on_ranks)
        return 0
    unknown = [part for part in options.parts if part not in (*PARTS, "train")]
    if unknown:
        raise InputError(f"no part {unknown[0]}; there are train, {', '.join(PARTS)}")
    train(settings)
    console, figures, problems = Console(), {}, []
    for part, module in PARTS.items():
        if options.parts and part not in options.parts:
            continue
        figures[part] = figures_of(part, settings, options.fresh)
        for table in module.tables(figures[part]):
            console.print(table)
        problems += [f"{part}: {text}" for text in module.missed(figures[part])]
    for text in problems:
        console.print(f"missed: {text}", style="red", markup=False)
    if options.json:
        write_json(options.json, figures)
    return 1 if options.check and problems else 0


def main() -> int:
    options = build_parser().parse_args()
    try:
        return run(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
