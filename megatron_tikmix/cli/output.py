"""The output of commands: tables for people, one JSON object for programs."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from megatron_tikmix.jsonl import json_line

PIPED_WIDTH = 160
"""Columns of a table that is not for a terminal."""

Answer = dict[str, Any]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option --json, for :func:`print_answer`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def print_answer(answer: Answer, show: Callable[[Console], None], *, as_json: bool) -> None:
    """Print `answer` as JSON, or have `show` print it on a console."""
    if as_json:
        sys.stdout.write(json_line(answer))
    else:
        show(Console(width=None if sys.stdout.isatty() else PIPED_WIDTH))
