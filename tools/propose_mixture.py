"""Propose a mixture for a model that is there already: probe and decide at a checkpoint.

  python tools/propose_mixture.py RUN_DIR [--iteration N] [--json FILE] [--section.field value ...]
  torchrun --nproc-per-node 8 tools/propose_mixture.py RUN_DIR ...

Nothing is trained, and nothing of the run is changed. The model comes from a checkpoint in RUN_DIR
(the newest one, or that of --iteration), everything else from RUN_DIR/config.yaml and the options
that override it: other tasks, other domains (--data.manifest, --data.domains; the tokenizer must
be the model's), another layout, a larger probe (--probe.sub_batches), --remix.constraints....

On standard output, one line: the mixture as Megatron-LM takes it, --data-path WEIGHT PREFIX ...
On standard error: influence with its errors, what would move, and why. --json writes all of it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_tikmix.errors import InputError
from megatron_tikmix.log import configure_logging, tell_error

MOST_TASKS = 6


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--iteration", type=int, help="the checkpoint's (default: the newest)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the proposal as JSON")
    return parser


def propose_mixture(argv: Sequence[str] | None) -> None:
    """Measure, decide and print.

    Raises:
        InputError: told in one sentence.
    """
    arguments, overrides = build_parser().parse_known_args(argv)
    # Imported here: megatron-core takes seconds to load.
    from megatron_tikmix.cli.propose import propose, read_config
    from megatron_tikmix.monitoring.files import json_line
    from megatron_tikmix.monitoring.tables import boundary_table
    from megatron_tikmix.monitoring.words import decision_in_words

    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    config = read_config(arguments.run_dir, overrides)
    proposal, is_main = propose(config, arguments.iteration)
    if not is_main:
        return
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 100)
    before = {"weights": proposal.at.prior.to_json()}
    for part in boundary_table(before, proposal.row, {}, console.width, MOST_TASKS):
        console.print(part)
    console.print(decision_in_words(None, proposal.row), markup=False, highlight=False)
    if arguments.json is not None:
        arguments.json.write_text(json_line(proposal.to_json()), encoding="utf-8")
    print("--data-path", *proposal.data_path)


def main(argv: Sequence[str] | None = None) -> int:
    configure_logging()
    try:
        propose_mixture(argv)
    except InputError as error:
        tell_error(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
