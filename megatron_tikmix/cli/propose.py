"""Propose a mixture for a model that is there already: probe and decide at a checkpoint.

  tikmix propose RUN_DIR [--iteration N] [--json FILE] [--section.field value ...]
  torchrun --nproc-per-node 8 -m megatron_tikmix.cli propose RUN_DIR ...

Nothing is trained, and nothing of the run is changed. Parameters and the optimizer's second
moments come from a checkpoint in RUN_DIR (the newest one, or that of --iteration), everything else
from RUN_DIR/config.yaml and the options that override it: other tasks, other domains
(--data.manifest, --data.domains; the tokenizer must be the model's), another layout, a larger probe
(--probe.sub_batches), --remix.constraints....

On standard output, one line: the mixture as Megatron-LM takes it, --data-path WEIGHT PREFIX ...
On standard error: influence with its errors, what would move, and why. --json writes all of it.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_tikmix.config import RunConfig, launched_world, load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.decision.decide import Boundary, Decision
from megatron_tikmix.decision.ledger import Ledger, StageRow
from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import json_line
from megatron_tikmix.measure.probe_plan import plan_probe
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.megatron.collectives import make_on_all_ranks
from megatron_tikmix.megatron.groups import Parallel, initialize, shut_down
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.monitoring.tables import boundary_table
from megatron_tikmix.monitoring.words import decision_in_words
from megatron_tikmix.training.build import (
    build_checkpointer,
    build_training,
)
from megatron_tikmix.training.checkpoint import fingerprint
from megatron_tikmix.training.state import TrainState

MOST_TASKS = 6
"""Tasks with a column of their own in the table."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tikmix propose",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Every --section.field of the configuration overrides that of the run: "
        "python -m megatron_tikmix --help explains them.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--iteration", type=int, metavar="N", help="the checkpoint's (default: the newest)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the proposal as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments, overrides = build_parser().parse_known_args(argv)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    config = read_config(arguments.run_dir, overrides)
    proposal, is_main = propose(config, arguments.iteration)
    if is_main:
        if arguments.json is not None:
            arguments.json.write_text(json_line(proposal.to_json()), encoding="utf-8")
        print_proposal(proposal)
    return 0


def print_proposal(proposal: "Proposal") -> None:
    """Print the mixture on standard output, and how it came about on standard error."""
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 100)
    before = replace(proposal.row, weights=proposal.at.prior)
    for part in boundary_table(before, proposal.row, {}, console.width, MOST_TASKS):
        console.print(part)
    console.print(decision_in_words(None, proposal.row), markup=False, highlight=False)
    print("--data-path", *proposal.data_path)


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """The decision made on measurements at a checkpoint; complete on the main rank only."""

    at: Boundary
    decision: Decision
    prefixes: dict[str, str]
    """The path of each domain's training tokens, without .bin or .idx."""

    @property
    def data_path(self) -> list[str]:
        """Weight, prefix, weight, prefix, … as Megatron-LM's ``--data-path`` takes them.

        Domains of weight 0 are left out: megatron-core refuses such a weight.
        """
        weights = self.decision.mixture.to_json()
        named = [(weight, self.prefixes[name]) for name, weight in weights.items() if weight > 0]
        return [part for weight, prefix in named for part in (repr(weight), prefix)]

    @property
    def row(self) -> StageRow:
        """The row of the ledger that a boundary here would have written."""
        return self.decision.row(self.at)

    def to_json(self) -> dict[str, Any]:
        """:attr:`row`, the mixture before (`weights_before`), and `data_path`."""
        before = self.at.prior.to_json()
        return {**self.row.to_json(), "weights_before": before, "data_path": self.data_path}


def read_config(run_dir: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of a run, set to decide here and now, without training.

    Resets are due whatever the phase; candidates of TiKMiX-M are measured by influence; a run
    whose mixture was static or given is decided on by TiKMiX-D, unless overridden.

    Args:
        overrides: ``--section.field value ...``, beyond what the run has.

    Raises:
        InputError: there is no such run, or an override is bad.
    """
    file = Path(run_dir) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{run_dir} has no config.yaml; give the run_dir of a run")
    config, _ = load_config([str(file), *overrides])
    config.run_dir = run_dir  # it may have been moved
    remix, train = config.remix, config.train
    if not config.decides:
        remix.policy = "tikmix_d" if remix.policy in ("static", "schedule") else remix.policy
        remix.schedule = None
        # As long as the run itself, where it had no intervals.
        remix.interval_samples = (
            remix.interval_samples or train.train_iters * train.global_batch_size
        )
    remix.mode, remix.measure, remix.require_audit = "apply", "gradient", False
    remix.start, remix.stop, remix.in_lr_decay = 0, None, True
    config.audit.enabled = False
    config.check_sections()
    return config


def propose(config: RunConfig, iteration: int | None = None) -> tuple[Proposal, bool]:
    """Measure and decide at a checkpoint, on the ranks that were launched. Collective.

    Args:
        config: of :func:`read_config`.
        iteration: the checkpoint's; None: the newest one.

    Returns:
        the proposal, whole on the main rank; and whether this is the main rank.

    Raises:
        InputError: no such checkpoint, or it does not fit the configuration or the data.
    """
    config.check(launched_world()[2])
    parallel = initialize(
        config.model, config.seed, config.timeout_minutes, config.decision_timeout_minutes
    )
    try:
        data = make_on_all_ranks(parallel, lambda: TrainingData(config))
        return _propose(config, data, iteration, parallel), parallel.is_main
    finally:
        shut_down()


def _propose(
    config: RunConfig, data: TrainingData, iteration: int | None, parallel: Parallel
) -> Proposal:
    plan = plan_probe(config, parallel.world_size, data)
    forward_backward, optimizer, scheduler = build_training(
        config, data.manifest.vocab_size, data.boundaries, parallel
    )
    # Data may be other than what was trained on; the parameters must be this model's.
    of_model = {
        name: value
        for name, value in fingerprint(config, data).items()
        if name.startswith("model.") or name in ("vocab_size", "data.sequence_length")
    }
    state = TrainState(config.train.train_iters, data.initial_schedule())
    checkpointer = build_checkpointer(config, forward_backward, optimizer, scheduler, of_model)
    if not checkpointer.load_latest(state, iteration):
        raise InputError(f"{config.run_dir} has no checkpoint yet; there is no model to measure")
    assert plan is not None
    remixer = Remixer.of(config, data, forward_backward, optimizer, scheduler, plan)
    at = boundary_at(state, data, config)
    return Proposal(
        at=at,
        decision=remixer.remix(at),
        prefixes={
            name: str(data.manifest.split(name, "train").prefix.absolute()) for name in data.names
        },
    )


def boundary_at(state: TrainState, data: TrainingData, config: RunConfig) -> Boundary:
    """The boundary that lies at a checkpoint.

    Where a stage has just begun there, it is that stage's own decision that is made again, from
    the mixture before it. Where the domains are not those trained on, the mixture in force is
    `data.initial_mixture`, and nothing was measured before.
    """
    interval = config.remix.interval_samples
    assert interval is not None
    schedule, ledger = state.schedule, state.ledger
    counts_D = schedule.domain_counts(state.consumed_samples).tolist()
    drawn = dict(zip(schedule.domains, counts_D, strict=True))
    begun = schedule.stages[-1].start_sample == state.consumed_samples and len(ledger) > 1
    prior: Mixture = schedule.mixture(-2 if begun else -1)
    ledger = ledger[:-1] if begun else ledger
    stage = len(ledger)
    if set(schedule.domains) != set(data.names):
        prior, ledger = data.initial_schedule().mixture(0), Ledger()
    return Boundary(
        stage=stage,
        iteration=state.iteration,
        prior=prior,
        consumed={name: drawn.get(name, 0) for name in data.names},
        interval_samples=interval,
        ledger=ledger,
    )
