"""Tokens per second of a probe and of training, interleaved on the same ranks and micro-batch.

A repetition trains for some steps, probes in each mode, and trains again; a probe is compared with
the training right before and after it. A whole probe is timed, validation gradients included.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from influence_parts.statistics import Array, mean_and_interval
from influence_parts.trained import Figures, Settings, Trained, trained, write_json
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.step import train_step

RANKS = 2
REPETITIONS = 6
STEPS = 30
"""Of training, between two probes."""
MODES = ("sharded", "replicated")
TARGET = 0.95


def measure(settings: Settings) -> Figures:
    """Starts the ranks, and reads what they found."""
    path = settings.work / "throughput-of-ranks.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(RANKS), sys.argv[0], "throughput"]
    command += ["--data", str(settings.data), "--work", str(settings.work)]
    if subprocess.run([*command, "--on_ranks", str(path)]).returncode:
        raise InputError("throughput: the ranks failed; the reason is above")
    figures: Figures = json.loads(path.read_text(encoding="utf-8"))
    return figures


def on_ranks(settings: Settings, path: Path) -> None:
    """On each of the ranks that were launched."""
    torch.set_num_threads(1)
    with trained(settings) as found:
        figures = interleaved(found, settings)
        if found.run.parallel.is_main:
            write_json(path, figures)


def interleaved(found: Trained, settings: Settings) -> Figures:
    probes = {mode: found.probe(seed=11, data_parallel_mode=mode) for mode in MODES}
    sub_batches = found.config.probe.sub_batches
    train = training_of(found)

    def passes(mode: str, stage: int) -> int:
        probe = probes[mode]
        with probe.open(stage):
            probe.add(np.full(len(probe.domains), sub_batches))
        return probe.tokens

    ratios: dict[str, list[Array]] = {mode: [] for mode in MODES}
    speeds: dict[str, list[Array]] = {name: [] for name in ("training", *MODES)}
    train()  # everything once, unmeasured: memory is found, caches are filled
    for mode in MODES:
        passes(mode, 1)
    for repetition in range(REPETITIONS):
        before = speed(train)
        order = MODES if repetition % 2 else MODES[::-1]
        for mode in order:
            probing = speed(partial(passes, mode, 2 + repetition))
            after = speed(train)
            ratios[mode].append(probing * (1 / before + 1 / after) / 2)
            speeds[mode].append(probing)
            speeds["training"].append(after)
            before = after
        if found.run.parallel.is_main:
            settings.say(f"repetition {repetition + 1} of {REPETITIONS}")
    return {
        "ranks": found.run.parallel.world_size,
        "repetitions": REPETITIONS,
        "tokens_per_second": {name: float(np.median(v, axis=0)[0]) for name, v in speeds.items()},
        "ratio": {mode: mean_and_interval(np.array(v)[:, 0]) for mode, v in ratios.items()},
        "ratio_by_processor": {
            mode: mean_and_interval(np.array(v)[:, 1]) for mode, v in ratios.items()
        },
    }


def training_of(found: Trained) -> Callable[[], int]:
    """A function that trains for some steps and returns the tokens of them."""
    run, config = found.run, found.config
    size = config.train.global_batch_size
    per_pass = config.train.micro_batch_size * run.parallel.data_parallel_size

    def train() -> int:
        batches = run.loader.interval(run.state.consumed_samples, STEPS * size)
        for _ in range(STEPS):
            train_step(
                run.forward_backward, batches, size // per_pass, run.optimizer, run.scheduler, size
            )
            run.state.advance(size, skipped=False)
        return STEPS * size * config.data.sequence_length

    return train


def speed(work: Callable[[], int]) -> Array:
    """Tokens per second by the clock, and per second of this rank's processor, (2,).

    The second is the steadier one on a busy machine, but leaves out what ranks wait for.
    """
    _wait()
    started, busy = time.perf_counter(), time.process_time()
    tokens = work()
    _wait()
    return tokens / np.array([time.perf_counter() - started, time.process_time() - busy])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    torch.distributed.barrier()


def tables(figures: Figures) -> list[Table]:
    table = Table("", "tokens/s (median)", "of training's speed", "by processor time")
    table.title = f"Speed on {figures['ranks']} ranks, {figures['repetitions']} repetitions"
    for name, value in figures["tokens_per_second"].items():
        ratios = [figures[key].get(name) for key in ("ratio", "ratio_by_processor")]
        shares = [f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" if r else "" for r in ratios]
        table.add_row(name, f"{value:,.0f}", *shares)
    return [table]


def missed(figures: Figures) -> list[str]:
    return [
        f"{mode}: a probe has {ratio['mean']:.3f} of training's speed; the target is {TARGET}"
        for mode, ratio in figures["ratio"].items()
        if ratio["mean"] < TARGET
    ]
