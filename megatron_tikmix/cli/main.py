"""The program ``tikmix``: runs the module of a command, and says in one sentence what failed."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

import megatron_tikmix
from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.log import configure_logging, print_error

COMMANDS = {
    "preprocess": "turn text into Megatron's .bin/.idx files and a manifest of domains",
    "inspect": "ask about a run: summary, mixture, influence, why, compare",
    "report": "write a run's report.html: what moved, why, and what came of it",
    "propose": "measure influence at a checkpoint and propose a mixture",
    "rehearse": "memory, collectives and host waits of one rank of a job, without a GPU",
    "checkpoint": "list, verify and show checkpoints",
}
"""Every command and its line of help. The command `x` is the module ``megatron_tikmix.cli.x``."""


def build_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {line}" for name, line in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="tikmix",
        usage="tikmix COMMAND ...\n       tikmix COMMAND --help\n       tikmix --version",
        description="\n".join(
            [
                "What goes before, beside and after a training run of megatron_tikmix.",
                "",
                "commands:",
                *lines,
                "",
                "Training itself: torchrun --nproc-per-node N -m megatron_tikmix CONFIG.yaml",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"megatron_tikmix {megatron_tikmix.__version__}"
    parser.add_argument("--version", action="version", version=version)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the command line) names.

    Returns:
        the exit code: the command's own, 2 for bad input, 1 for a measurement that failed.
    """
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else "--help"
    if command.startswith("-"):
        parser = build_parser()
        parser.parse_args([command])  # prints help or the version and exits, or refuses
        parser.error("name the command first, as in tikmix inspect --help")
    if command not in COMMANDS:
        print_error(f"there is no command {command!r}; {_hint(command)}")
        return 2
    # Before the command's module, which may import megatron-core: its notes on optional packages
    # are dropped.
    configure_logging()
    try:
        module = importlib.import_module(f"megatron_tikmix.cli.{command}")
        return int(module.main(argv[1:]))
    except InputError as error:
        print_error(str(error))
        return 2
    except TrainingError as error:
        print_error(str(error))
        return 1


def _hint(command: str) -> str:
    similar = difflib.get_close_matches(command, COMMANDS, n=1)
    return f"did you mean {similar[0]}?" if similar else "tikmix --help lists the commands"
