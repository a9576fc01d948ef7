"""Whether every layout gives the same numbers: losses, influence, mixtures and samples.

Everything starts from one checkpoint of a small model (benchmarks/parity.yaml), trained on one rank
on made-up text. Each part prints a table:

  layouts     one rank against tensor, sequence, pipeline, interleaved pipeline and data parallel
              layouts of up to 8 ranks, both modes of the probe, and other micro-batch sizes
  memory      bytes of the validation gradients that a probe keeps on a rank, against the plan's
  precision   influence in bf16 against fp32

All that is measured is kept under --work as soon as it is there: a benchmark that was stopped goes
on where it was; --fresh measures anew. Without a GPU all ranks share the cores, and the layouts of
8 ranks take minutes each; small ones come first.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

for module in ("megatron", "torch"):  # their notes on optional packages; before they are imported
    warnings.filterwarnings("ignore", module=rf"{module}\..*")

import megatron_tikmix  # noqa: E402, F401  (first: it lets megatron-core do without CUDA)

sys.path.append(str(Path(__file__).parents[1]))  # tests measure memory as one of its parts does

# isort: split
from influence_parts.trained import write_json  # noqa: E402
from parity_parts import layouts, memory, precision  # noqa: E402
from parity_parts.start import Settings, prepare  # noqa: E402
from rich.console import Console  # noqa: E402

from megatron_tikmix.errors import InputError  # noqa: E402

PARTS: dict[str, Any] = {"layouts": layouts, "memory": memory, "precision": precision}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="""\
examples:
  python benchmarks/parity.py --check
  python benchmarks/parity.py --layouts dp2 tp2-sp --fresh
  python benchmarks/parity.py --parts layouts --json figures.json
""",
    )
    add = parser.add_argument
    add(
        "--parts",
        nargs="+",
        default=list(PARTS),
        choices=PARTS,
        metavar="PART",
        help=f"{', '.join(PARTS)} (default: all)",
    )
    add(
        "--layouts",
        nargs="+",
        default=list(layouts.LAYOUTS),
        choices=layouts.LAYOUTS,
        metavar="LAYOUT",
        help=f"{', '.join(layouts.LAYOUTS)} (default: all)",
    )
    add("--check", action="store_true", help="exit 1 if a figure misses its target")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add("--fresh", action="store_true", help="measure again, whatever is kept")
    add(
        "--work",
        type=Path,
        default=Path("runs/benchmarks/parity"),
        metavar="DIR",
        help="data, runs and figures (default: runs/benchmarks/parity)",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    settings = Settings(options.work.resolve())
    prepare(settings)
    console = Console(width=None if sys.stdout.isatty() else 120)
    figures: dict[str, Any] = {}
    problems: list[str] = []
    for part in options.parts:
        figures[part] = PARTS[part].measure(settings, options.layouts, options.fresh)
        for table in PARTS[part].tables(figures[part]):
            console.print(table)
        problems += [f"{part}: {text}" for text in PARTS[part].missed(figures[part])]
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
