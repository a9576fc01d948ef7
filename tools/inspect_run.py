"""Look at a run on the terminal, from its run directory alone, also while it goes on.

  inspect_run.py summary RUN_DIR              where it is, what its boundaries did, what they cost
  inspect_run.py mixture RUN_DIR              every domain's weight in each stage, tokens, epochs
  inspect_run.py influence RUN_DIR [--stage K]    the matrix measured before a stage, with errors
  inspect_run.py why RUN_DIR DOMAIN [--stage K]   what pushed a domain's weight up or down
  inspect_run.py compare RUN_A RUN_B          losses at equal samples, mixtures, settings
  inspect_run.py report RUN_DIR [--baseline RUN_B]    write RUN_DIR/report.html

--json prints the same as one JSON object.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from megatron_tikmix.decision.explain import explain
from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring import answers as inspection
from megatron_tikmix.monitoring import tables as inspection_tables
from megatron_tikmix.monitoring.files import json_line
from megatron_tikmix.monitoring.report import write_report

PIPED_WIDTH = 160
"""Columns of a table that is not for a terminal."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("summary", "mixture", "influence", "why", "compare", "report"):
        command = commands.add_parser(name)
        command.add_argument("run_dir", metavar="RUN_A" if name == "compare" else "RUN_DIR")
        if name == "compare":
            command.add_argument("other", metavar="RUN_B")
        if name == "why":
            command.add_argument("domain", metavar="DOMAIN")
        if name in ("influence", "why"):
            command.add_argument("--stage", type=int, help="the stage decided (default: the last)")
        if name == "report":
            command.add_argument("--baseline", metavar="RUN_B", help="to hold task losses against")
            continue
        command.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def inspect_run(arguments: argparse.Namespace, console: Console) -> None:
    """Print the answer.

    Raises:
        InputError: no such run, stage or domain, or a damaged file.
    """
    if arguments.command == "report":
        print(write_report(arguments.run_dir, arguments.baseline))
        return
    history = inspection.open_run(arguments.run_dir)
    if arguments.command == "why":
        found = explain(history, arguments.domain, arguments.stage)
        if arguments.json:
            sys.stdout.write(json_line(found.to_json()))
        else:
            inspection_tables.show_why(found, console)
        return
    if arguments.command == "compare":
        answer = inspection.compare(history, inspection.open_run(arguments.other))
    elif arguments.command == "influence":
        answer = inspection.influence(history, arguments.stage)
    else:
        answer = getattr(inspection, arguments.command)(history)
    if arguments.json:
        sys.stdout.write(json_line(answer))
    elif arguments.command == "compare":
        names = [arguments.run_dir, arguments.other]
        inspection_tables.show_compare(answer, names, console)
    else:
        getattr(inspection_tables, f"show_{arguments.command}")(answer, console)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    try:
        inspect_run(arguments, console)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
