"""Write RUN_DIR/report.html, one page that needs no network, and print its path.

The page has the run in words, the mixture over time, what changed at each boundary and why,
influence with its errors, task losses, tokens and epochs, cost, configuration and versions. It is
made from the run directory alone: while the run goes on or afterwards, on any machine. A run that
ends writes it by itself.
"""

import argparse
from collections.abc import Sequence

from megatron_tikmix.monitoring.report import write_report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tikmix report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--baseline",
        metavar="RUN_B",
        help="the run to hold task losses against, after equally many samples (default: the "
        "configuration's `baseline`, if any)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    print(write_report(arguments.run_dir, arguments.baseline))
    return 0
