"""Look at checkpoints, without a job.

  tikmix checkpoint list RUN_DIR        the checkpoints of a run, the newest last, and which one is
                                        the latest: a start goes on from it, or if it is damaged
                                        from the newest one before it that is whole, see verify
  tikmix checkpoint verify RUN_DIR      check sizes and checksums of every file of every checkpoint
  tikmix checkpoint verify CHECKPOINT   check those of one, as RUN_DIR/checkpoints/iter_0000080
  tikmix checkpoint show CHECKPOINT     its layout, its stages, what decided them, its fingerprint

--json prints the same as one JSON object. The exit code is 1 if `verify` finds damage, 2 for a
path that is neither a run nor a checkpoint.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_tikmix.cli.output import Answer, add_json, print_answer
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.monitoring.words import clean
from megatron_tikmix.training.checkpoint_files import (
    MANIFEST,
    RECORD,
    CheckpointFolder,
    damage,
    read_manifest,
    read_record,
)

ACTIONS = {
    "list": ("RUN_DIR", "List the checkpoints of a run, and say which one is the latest."),
    "verify": ("RUN_DIR|CHECKPOINT", "Check sizes and checksums of every file."),
    "show": ("CHECKPOINT", "Show a checkpoint's layout, its stages and its fingerprint."),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tikmix checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    for name, (place, line) in ACTIONS.items():
        action = actions.add_parser(name, description=line)
        action.add_argument("path", type=Path, metavar=place)
        add_json(action)
    return parser


def list_run(run_dir: Path) -> Answer:
    """Every complete checkpoint of a run, and the iteration that its pointer names.

    Raises:
        InputError: not a run with checkpoints.
    """
    files = checkpoints_of(run_dir)
    rows: list[Answer] = []
    damaged: list[str] = []
    for iteration in files.iterations():
        path = files.path(iteration)
        try:
            record, manifest = read_record(path), read_manifest(path)
        except InputError as error:
            damaged.append(str(error))
            continue
        rows.append(
            {
                "iteration": iteration,
                "path": str(path),
                "consumed_samples": record["consumed_samples"],
                "stages": len(record["schedule"]["stages"]),
                "layout": record["layout"],
                "bytes": sum(file.stat().st_size for file in path.iterdir()),
                "files": None if manifest is None else len(manifest),
            }
        )
    order = files.newest_first()
    if order and order[0] not in files.iterations():
        damaged.append(f"{files.path(order[0])}, which {files.pointer.name} names, has no {RECORD}")
    return {
        "run_dir": str(run_dir),
        "latest": order[0] if order else None,
        "checkpoints": rows,
        "damaged": damaged,
    }


def verify(path: Path) -> Answer:
    """Return what is wrong with each checkpoint, None for undamaged ones.

    Raises:
        InputError: neither a run with checkpoints nor a checkpoint.
    """
    named_so = re.fullmatch(r"iter_\d+", path.name) is not None
    if (named_so and path.is_dir()) or (path / RECORD).exists():
        paths = [path]
    else:
        files = checkpoints_of(path)
        # That which the pointer names belongs to them also if its record is gone.
        numbers = sorted({*files.iterations(), *files.newest_first()})
        paths = [files.path(iteration) for iteration in numbers]
    rows = [
        {"path": str(one), "damage": damage(one), "checksums": (one / MANIFEST).exists()}
        for one in paths
    ]
    return {"whole": all(row["damage"] is None for row in rows), "checkpoints": rows}


def show(path: Path) -> Answer:
    """A checkpoint's record: where the run was, its schedule by stage, its fingerprint.

    Raises:
        InputError: not a checkpoint, or a damaged record.
    """
    record = read_record(path)
    schedule = MixtureSchedule.from_json(
        record["schedule"], record["consumed_samples"], record.get("domain_samples")
    )
    stages = [
        {
            "stage": stage.index,
            "start_sample": stage.start_sample,
            "start_iteration": row.get("start_iteration"),
            "source": row.get("source"),
            "reason": row.get("reason"),
            "weights": schedule.mixture(stage.index).to_json(),
        }
        for stage, row in zip(schedule.stages, record["ledger"], strict=True)
    ]
    same = ("iteration", "consumed_samples", "skipped_iterations", "layout", "fingerprint")
    counts = dict(zip(schedule.domains, record.get("domain_samples") or [], strict=False))
    return {
        "path": str(path),
        **{name: record[name] for name in same},
        "domain_samples": counts,
        "schedule_digest": schedule.digest(),
        "stages": stages,
    }


def checkpoints_of(run_dir: Path) -> CheckpointFolder:
    """Return the checkpoints of a run directory, or of a folder of checkpoints itself.

    Raises:
        InputError: there is no such folder.
    """
    inner = run_dir / "checkpoints"
    folder = inner if inner.is_dir() else run_dir
    if not folder.is_dir() or (folder is run_dir and not CheckpointFolder(folder).iterations()):
        raise InputError(
            f"{run_dir} has no checkpoints; give a run's directory, or one of its "
            f"checkpoints/iter_* folders"
        )
    return CheckpointFolder(folder)


def print_list(answer: Answer, console: Console) -> None:
    table = Table("iteration", "samples", "stages", "tp × pp × dp", "MB", "")
    for row in answer["checkpoints"]:
        notes = ["latest"] if row["iteration"] == answer["latest"] else []
        notes += ["without checksums"] if row["files"] is None else []
        layout = " × ".join(map(str, row["layout"][:3]))
        size, samples = f"{row['bytes'] / 1e6:,.1f}", f"{row['consumed_samples']:,}"
        cells = (str(row["iteration"]), samples, str(row["stages"]), layout, size)
        table.add_row(*cells, ", ".join(notes))
    console.print(table)
    for text in answer["damaged"]:
        console.print(f"damaged: {text}", markup=False, soft_wrap=True)


def print_verify(answer: Answer, console: Console) -> None:
    for row in answer["checkpoints"]:
        whole = "whole" if row["checksums"] else "its record can be read; it has no checksums"
        console.print(f"{row['path']}: {row['damage'] or whole}", markup=False, soft_wrap=True)


def print_show(answer: Answer, console: Console) -> None:
    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    layout = " × ".join(map(str, answer["layout"][:3]))
    say(f"{answer['path']}: iteration {answer['iteration']}, tp × pp × dp {layout}")
    say(f"{answer['consumed_samples']:,} samples; {answer['skipped_iterations']} updates skipped")
    domains = list(answer["stages"][-1]["weights"]) if answer["stages"] else []
    table = Table("stage", "from iteration", "source", *map(clean, domains))
    for row in answer["stages"]:
        weights = [f"{row['weights'][name]:.4f}" for name in domains]
        table.add_row(str(row["stage"]), str(row["start_iteration"]), row["source"], *weights)
    if answer["domain_samples"]:
        drawn = [f"{answer['domain_samples'][name]:,}" for name in domains]
        table.add_row("samples drawn", "", "", *drawn)
    console.print(table)
    for field, value in answer["fingerprint"].items():
        say(f"  {field}: {value}")


def main(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    answers = {"list": list_run, "verify": verify, "show": show}
    prints = {"list": print_list, "verify": print_verify, "show": print_show}
    answer = answers[arguments.action](arguments.path)
    print_answer(answer, partial(prints[arguments.action], answer), as_json=arguments.json)
    return 0 if answer.get("whole", True) else 1
