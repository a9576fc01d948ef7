"""Kill a run of two ranks at random moments, start it again, and compare it with one never killed.

``python benchmarks/kill_resume.py --kills 100 --check``

Each attempt is two processes, forked from one that has imported everything, on one run directory;
SIGKILL strikes both, or one of them, and what a launcher does to the other follows: SIGTERM, and
SIGKILL soon after. Half of the moments are drawn over most of a whole run's duration, half are a
phase (start, step, measure, decide, ledger, save) and a few milliseconds into it. Runs follow
each other until there were enough kills; each is started again until it ends, and must then have
the parameters, optimizer state, ledger, metrics and samples, each consumed exactly once, of the run
that was never killed, bit for bit.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import Array
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from forked_ranks import fork_rank, free_port

import megatron_tikmix.training.build as entry
from megatron_tikmix.config import load_config
from megatron_tikmix.data.dataset import BlendedDataset
from megatron_tikmix.jsonl import append_jsonl, read_jsonl
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.training import loop, record
from megatron_tikmix.training.checkpoint import Checkpointer
from tests.conftest import build_corpus, without_timings

RANKS = 2
PHASES = ("start", "step", "measure", "decide", "ledger", "save")
SETTINGS: dict[str, Any] = {
    "timeout_minutes": 1,
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "make_vocab_size_divisible_by": 64,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "data": {"sequence_length": 32, "initial_mixture": "uniform"},
    "tasks": {"low": {"domain": "low"}, "high": {"domain": "high"}},
    "train": {"train_iters": 12, "micro_batch_size": 2, "global_batch_size": 8, "log_interval": 1},
    "optimizer": {"lr": 2e-3, "adam_beta2": 0.2, "weight_decay": 0.01},
    "checkpoint": {"save_interval": 3},
    "remix": {"interval_samples": 32, "influence": "marginal"},
    "probe": {"sub_batch_samples": 4, "task_samples": 12, "max_overhead": None},
    "evaluate": {"task_samples": 12},
}


class Attempt:
    """Two ranks of a run, from one start to their end, natural or not."""

    def __init__(self, config: Path, records: Path, number: int) -> None:
        self.phase = Array("b", RANKS, lock=False)
        port = free_port()
        records.mkdir(exist_ok=True)
        self._log = records / f"{number}.log"

        def train(rank: int) -> None:
            watch(self.phase, rank, records, number)
            entry.pretrain(*load_config([str(config)]))

        self.ranks = [
            fork_rank(rank, RANKS, port, self._log, partial(train, rank)) for rank in range(RANKS)
        ]
        self.codes: dict[int, int] = {}

    def running(self) -> list[int]:
        for process in self.ranks:
            if process not in self.codes:
                found, status = os.waitpid(process, os.WNOHANG)
                if found:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.ranks if process not in self.codes]

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Whether `until` came true within `seconds`, and while all ranks were running."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and len(self.running()) == RANKS:
            if until():
                return True
            time.sleep(0.0005)
        return False

    def kill(self, victims: Sequence[int]) -> None:
        """SIGKILL `victims`; the others get what a launcher has for them."""
        for number, targets in ((signal.SIGKILL, victims), (signal.SIGTERM, self.ranks)):
            for process in targets:
                if process in self.running():
                    os.kill(process, number)
        end = time.monotonic() + 3
        while self.running() and time.monotonic() < end:
            time.sleep(0.01)
        for process in self.running():
            os.kill(process, signal.SIGKILL)
        while self.running():
            time.sleep(0.001)

    def finish(self) -> None:
        while self.running():
            time.sleep(0.01)
        if any(self.codes.values()):
            raise RuntimeError(f"an attempt that was not killed failed:\n{self._log.read_text()}")


def watch(phase: Any, rank: int, records: Path, number: int) -> None:
    """In a rank's process: tell its phase, and write down what it reads and what it ends with."""

    def in_phase(owner: Any, name: str, index: int) -> None:
        former = getattr(owner, name)

        def entered(*arguments: Any, **options: Any) -> Any:
            before, phase[rank] = phase[rank], index
            try:
                return former(*arguments, **options)
            finally:
                phase[rank] = before

        setattr(owner, name, entered)

    in_phase(loop, "train_step", PHASES.index("step"))
    in_phase(loop, "measure", PHASES.index("measure"))
    in_phase(Remixer, "remix", PHASES.index("decide"))
    in_phase(record, "append_jsonl", PHASES.index("ledger"))
    in_phase(Checkpointer, "save", PHASES.index("save"))

    read, save_to_end, train = BlendedDataset.__getitems__, loop.save_to_end, entry.train

    def begun(run: loop.Run) -> None:
        (records / f"{number}.start").write_text(str(run.state.consumed_samples))
        train(run)

    def recorded(self: BlendedDataset, indices: Sequence[int]) -> Any:
        samples = read(self, indices)
        for index, sample in zip(indices, samples, strict=True):
            tokens = hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest()
            row = {"attempt": number, "index": index, "domain": sample["domain"].item()}
            append_jsonl(records / f"samples_{rank}.jsonl", {**row, "tokens": tokens})
        return samples

    def digested(run: loop.Run) -> None:
        save_to_end(run)
        state = [
            value.detach() for chunk in run.forward_backward.model for value in chunk.parameters()
        ]
        for part in run.optimizer.chained_optimizers:
            for moments in part.optimizer.state.values():
                state += [value for value in moments.values() if isinstance(value, torch.Tensor)]
        digest = hashlib.sha256()
        for value in state:
            digest.update(value.numpy().tobytes())
        (records / f"digest_{rank}").write_text(digest.hexdigest())

    BlendedDataset.__getitems__ = recorded  # type: ignore[method-assign]
    loop.save_to_end = digested
    entry.train = begun


def outcome(run_dir: Path, records: Path) -> dict[str, Any]:
    """All that must be the same, however often the run was killed."""
    starts = {int(path.stem): int(path.read_text()) for path in records.glob("*.start")}

    def counts(row: dict[str, Any]) -> bool:
        """Whether no later attempt began before this sample, and so read it again."""
        later = (start for attempt, start in starts.items() if attempt > row["attempt"])
        return all(row["index"] < start for start in later)

    rows = [row for rank in range(RANKS) for row in read_jsonl(records / f"samples_{rank}.jsonl")]
    return {
        "digests": [(records / f"digest_{rank}").read_text() for rank in range(RANKS)],
        "ledger": without_timings(read_jsonl(run_dir / "mixture.jsonl")),
        "metrics": without_timings(read_jsonl(run_dir / "metrics.jsonl")),
        "samples": sorted(
            [row["index"], row["domain"], row["tokens"]] for row in rows if counts(row)
        ),
    }


class Trial:
    """Kills runs in `folder` until there were enough, and compares each with the reference."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, np.random.default_rng(seed)
        self._manifest = build_corpus(folder)
        self.kills: list[dict[str, Any]] = []
        self.runs: list[dict[str, Any]] = []
        started = time.monotonic()
        config, run_dir, records = self._new("whole")
        Attempt(config, records, 0).finish()
        self.seconds = time.monotonic() - started
        self._whole = outcome(run_dir, records)
        samples = SETTINGS["train"]["train_iters"] * SETTINGS["train"]["global_batch_size"]
        assert [row[0] for row in self._whole["samples"]] == list(range(samples))
        assert len(self._whole["ledger"]) == 3

    def _new(self, name: str) -> tuple[Path, Path, Path]:
        run_dir = self._folder / name
        data = SETTINGS["data"] | {"manifest": str(self._manifest)}
        config = self._folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(SETTINGS | {"run_dir": str(run_dir), "data": data}))
        return config, run_dir, self._folder / f"{name}_records"

    def one_run(self, kills: int) -> None:
        """A run that is killed up to `kills` times, or until it ends before its killer comes."""
        name = f"killed_{len(self.runs)}"
        config, run_dir, records = self._new(name)
        struck = 0
        for number in itertools.count():
            attempt = Attempt(config, records, number)
            if struck == kills or not self._kill(attempt, name):
                attempt.finish()
                break
            struck += 1
        found = outcome(run_dir, records)
        differs = [what for what in found if found[what] != self._whole[what]]
        self.runs.append({"run": name, "kills": struck, "differs": differs})
        if not differs:
            for path in (run_dir, records):
                shutil.rmtree(path)

    def _kill(self, attempt: Attempt, name: str) -> bool:
        """Strike once, if the run does not end first."""
        draw, started = self._random, time.monotonic()
        first = int(draw.integers(RANKS))
        victims = attempt.ranks if draw.random() < 0.5 else [attempt.ranks[first]]
        if draw.random() < 0.5:
            moment = "at random"
            attempt.wait(draw.uniform(0.0, 0.8 * self.seconds))
        else:
            index, times = int(draw.integers(len(PHASES))), int(draw.integers(1, 3))
            moment = f"in {PHASES[index]}"
            if not self._reach(attempt, first, index, times):
                return False
            attempt.wait(draw.uniform(0.0, 0.03))
        if len(attempt.running()) < RANKS:
            # Of whole runs the quickest counts: a machine that is busy at times is no excuse.
            self.seconds = min(self.seconds, time.monotonic() - started)
            return False
        phase = PHASES[attempt.phase[first]]
        attempt.kill(victims)
        self.kills.append({"run": name, "ranks": len(victims), "moment": moment, "phase": phase})
        return True

    @staticmethod
    def _reach(attempt: Attempt, rank: int, index: int, times: int) -> bool:
        """Whether `rank` entered the phase so many times, before its end."""
        for _ in range(times):
            if not attempt.wait(120, lambda: attempt.phase[rank] != index) and index != 0:
                return False
            if index == 0:
                return len(attempt.running()) == RANKS
            if not attempt.wait(120, lambda: attempt.phase[rank] == index):
                return False
        return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--kills_per_run", type=int, default=5, help="at most (default: 5)")
    parser.add_argument("--seed", type=int, default=1, help="of moments and victims (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a run differs")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kill_resume_")))
        trial = Trial(folder, arguments.seed)
        while (left := arguments.kills - len(trial.kills)) > 0:
            trial.one_run(min(left, arguments.kills_per_run))
            print(f"{len(trial.kills)} kills, {trial.runs[-1]}", flush=True)
    phases = collections.Counter((kill["phase"], kill["ranks"]) for kill in trial.kills)
    print("\n| struck in | both ranks | one rank |\n|---|---|---|")
    for phase in PHASES:
        print(f"| {phase} | {phases[phase, RANKS]} | {phases[phase, 1]} |")
    wrong = [run for run in trial.runs if run["differs"]]
    print(f"\n{len(trial.kills)} kills over {len(trial.runs)} runs; runs that differ: {len(wrong)}")
    if arguments.json:
        figures = {"seed": arguments.seed, "kills": trial.kills, "runs": trial.runs}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if arguments.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
