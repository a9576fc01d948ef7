"""The checkpoint that everything starts from, and launches from copies of it."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_tikmix.errors import InputError
from parity_parts import corpus

ROOT = Path(__file__).parents[2]
START, STEPS = 40, 20
BOUNDARIES = (46, 54)
"""Iterations: of the checkpoint, trained from it, and at which the mixture is decided."""

BATCH = 16
LIMIT_SECONDS = 3000

Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Where things are; `work` holds the data, the runs and the finished figures."""

    work: Path

    def say(self, text: str) -> None:
        """Progress, apart from the tables."""
        Console(stderr=True).print(text, style="dim", markup=False, highlight=False)

    def run_dir(self, name: str) -> Path:
        return self.work / "runs" / name


def configured(settings: Settings, name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The configuration of benchmarks/parity.yaml with ``{"section.field": value}`` put in."""
    config = yaml.safe_load((ROOT / "benchmarks" / "parity.yaml").read_text(encoding="utf-8"))
    first, second = BOUNDARIES
    fields = {
        "run_dir": str(settings.run_dir(name)),
        "data.manifest": str(settings.work / "data" / "domains.yaml"),
        "train.train_iters": START + STEPS,
        "remix.first_interval_samples": first * BATCH,
        "remix.interval_samples": (second - first) * BATCH,
        **fields,
    }
    for field, value in fields.items():
        *sections, last = field.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    loaded: dict[str, Any] = config
    return loaded


def prepare(settings: Settings) -> None:
    """Write the data and train one rank up to the checkpoint, unless it is there."""
    corpus.build(settings.work / "data")
    if not _finished(settings.run_dir("start"), START):
        settings.say(f"start: one rank, {START} iterations …")
        launch(settings, "start", 1, {"train.train_iters": START}, copied=False)


def new_run(settings: Settings, name: str, fields: dict[str, Any], *, copied: bool = True) -> Path:
    """Make the run's folder anew, with a copy of the checkpoint in it; its configuration."""
    run_dir, start = settings.run_dir(name), settings.run_dir("start")
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    for part in ("checkpoints", "metrics.jsonl", "mixture.jsonl") if copied else ():
        copy = shutil.copytree if (start / part).is_dir() else shutil.copy
        copy(start / part, run_dir / part)
    config = run_dir / "launched.yaml"
    config.write_text(yaml.safe_dump(configured(settings, name, fields)), encoding="utf-8")
    return config


def launch(
    settings: Settings,
    name: str,
    ranks: int,
    fields: dict[str, Any],
    *,
    copied: bool = True,
    record: bool = False,
    fresh: bool = False,
) -> float:
    """Train as any user does, from the checkpoint, unless that was done; seconds, 0 if so.

    Args:
        copied: start from a copy of the checkpoint, not from nothing.
        record: write every sample that is read into RUN_DIR/samples.

    Raises:
        InputError: it failed; its log is named.
    """
    run_dir = settings.run_dir(name)
    end = int(fields.get("train.train_iters", START + STEPS))
    if not fresh and _finished(run_dir, end):
        return 0.0
    config = new_run(settings, name, fields, copied=copied)
    if record:
        (run_dir / "samples").mkdir()
    program = ["megatron_tikmix"]
    if record:
        samples = json.dumps([str(run_dir / "samples")])
        program = ["tests.ranks", "tests.recording:recording", samples]
    started = time.perf_counter()
    on_ranks(ranks, ["-m", *program, str(config)], run_dir / "log.txt")
    return time.perf_counter() - started


def on_ranks(ranks: int, arguments: list[str], log: Path) -> None:
    """Start so many ranks of a program and wait for them.

    Raises:
        InputError: they failed; the log is named, and its end given.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *arguments]
    folders = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(folders)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with log.open("w", encoding="utf-8") as file:
        result = subprocess.run(
            command, stdout=file, stderr=file, cwd=ROOT, env=environment, timeout=LIMIT_SECONDS
        )
    if result.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-5:]
        raise InputError(f"{ranks} ranks failed, see {log}: {' | '.join(last)}")


def _finished(run_dir: Path, iteration: int) -> bool:
    latest = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return latest.is_file() and int(latest.read_text()) == iteration
