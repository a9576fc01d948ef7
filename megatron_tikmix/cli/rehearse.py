"""Rehearse one rank of a job: its memory, its collectives and its host waits, without a GPU.

The model of CONFIG.yaml is built at its real size on a device that has shapes and no numbers, in
a job of --world_size ranks of which there is only this one. It trains two steps and measures
influence on blank samples. No accelerator is needed, no data is read, and little memory is used.

It prints the peak of memory on the accelerator with its largest parts, collectives by kind and
group, places where the host waits for the accelerator, and tensors that are on the wrong device.
Bytes are those of tensors: CUDA, NCCL and the fragments of the allocator come on top. Layers are
those that run without Transformer Engine, whose kernels cannot be rehearsed; evaluation, rollouts
and checkpoints are not in it.

The first pipeline stage (--rank 0) holds most activations, the last one (--rank WORLD_SIZE - 1) the
logits: rehearse both.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_tikmix.cli.output import PIPED_WIDTH
from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.jsonl import json_line
from megatron_tikmix.monitoring.tables import Table

if TYPE_CHECKING:
    from megatron_tikmix.rehearsal.rehearse import Phase, Rehearsal

_GIB = 2**30


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tikmix rehearse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Every --section.field overrides that of CONFIG.yaml: "
        "python -m megatron_tikmix --help explains them.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("--world_size", type=int, required=True, help="ranks of the job")
    parser.add_argument("--rank", type=int, default=0, help="the one that is rehearsed (default 0)")
    parser.add_argument(
        "--vocab_size",
        type=int,
        help="of the tokenizer (default: that of data.manifest, which need not be there otherwise)",
    )
    parser.add_argument(
        "--domains", type=int, help="their number (default: those of data.manifest)"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all of it as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    arguments, overrides = build_parser().parse_known_args(argv)
    if not 0 <= arguments.rank < arguments.world_size:
        raise InputError(
            f"--rank {arguments.rank} must be from 0 to {arguments.world_size - 1}, for "
            f"--world_size {arguments.world_size}"
        )
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    from megatron_tikmix.rehearsal import stand_in

    stand_in.install()  # before anything imports megatron-core
    from megatron_tikmix.config import load_config
    from megatron_tikmix.rehearsal.rehearse import rehearse

    config, _ = load_config([arguments.config, *overrides])
    size = _data_size(arguments, config)
    found = rehearse(config, arguments.world_size, arguments.rank, size.vocab_size, size.domains)
    if arguments.json is not None:
        arguments.json.write_text(json_line(found.to_json()), encoding="utf-8")
    console = Console(width=PIPED_WIDTH, highlight=False)
    show(console, found)
    if found.error is not None:
        raise TrainingError(f"the rehearsal broke off: {found.error}")
    return 0


@dataclass(frozen=True)
class _DataSize:
    vocab_size: int
    domains: int


def _data_size(arguments: argparse.Namespace, config: Any) -> _DataSize:
    """The numbers that the rehearsal needs of the data: from the command line, or its manifest."""
    vocab_size, domains = arguments.vocab_size, arguments.domains
    if vocab_size is None or domains is None:
        from megatron_tikmix.data.domains import DomainManifest

        path = config.data.manifest
        if not Path(path).is_file():
            raise InputError(
                f"data.manifest {path} is not there; give --vocab_size and --domains instead"
            )
        manifest = DomainManifest.load(path)
        vocab_size = vocab_size or manifest.vocab_size
        domains = domains or len(config.data.domains or manifest.domains)
    for name, value in (("vocab_size", vocab_size), ("domains", domains)):
        if value < 1:
            raise InputError(f"--{name} ({value}) must be at least 1")
    return _DataSize(vocab_size, domains)


def show(console: Console, found: "Rehearsal") -> None:
    """Print a rehearsal."""
    place = ", ".join(f"{name} {rank}" for name, rank in found.place.items())
    console.print(f"rank {found.rank} of {found.world_size} ({place})")
    console.print(f"attention: {found.attention}")
    console.print(f"--dry_run plans: {found.plan.in_words()}")
    if found.cost is not None:
        console.print(f"a boundary: {found.cost.in_words()}")
    for phase in found.phases:
        console.print()
        console.print(f"{phase.name}: peak {phase.peak / _GIB:.2f} GiB{_scope(phase, found)}")
        for table in _tables(phase):
            if table.rows:
                console.print(table)
        if not phase.misplaced:
            console.print("nothing is on the wrong device")


def _scope(phase: "Phase", found: "Rehearsal") -> str:
    if phase.micro_batches and phase.micro_batches < found.micro_batches_of_step:
        return (
            f", with {phase.micro_batches} of a step's {found.micro_batches_of_step} micro-batches"
        )
    return f", with {found.sub_batches} sub-batches" if "sub-batches" in phase.name else ""


def _tables(phase: "Phase") -> Iterator[Table]:
    yield Table(
        heads=("GiB", "tensors", "shape", "type", "made at"),
        rows=[
            (
                f"{part.nbytes / _GIB:.3f}",
                f"{part.count:,}",
                " × ".join(map(str, part.shape)) or "1",
                part.dtype,
                part.place,
            )
            for part in phase.parts
        ],
        words=(2, 3, 4),
    )
    yield Table(
        heads=("collective", "group", "ranks", "times", "MiB"),
        rows=[
            (
                each.kind,
                each.group,
                f"{each.ranks:,}",
                f"{each.count:,}",
                f"{each.nbytes / 2**20:,.1f}",
            )
            for each in phase.traffic
        ],
        words=(0, 1),
    )
    yield Table(
        heads=("the host waits at", "times"),
        rows=[(place, f"{count:,}") for place, count in phase.waits.items()],
        words=(0,),
    )
    yield Table(
        heads=("on the wrong device at", "times"),
        rows=[(place, f"{count:,}") for place, count in phase.misplaced.items()],
        words=(0,),
    )
