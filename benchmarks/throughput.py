"""Training with remixing against a plain megatron-core loop on a static BlendedDataset.

Both train the same small model (benchmarks/parity.yaml) on one rank of this process, in turns of
some steps, each turn right beside a turn of the other: a pair. A ratio is the plain loop's seconds
by ours, so 1 is equal and more is faster; by processor time and by the clock.

  excluded   training inside an interval, alone
  included   with each turn's share of a boundary: probe, decision and the opening of the stage. A
             boundary is measured after every few pairs, and spread over an interval in which the
             probe's tokens are the share that --share says. Evaluation and checkpoints, which a
             plain loop has too, are in neither.

Samples, model and optimizer are the same in number and kind, not the same numbers: each loop has
its own data order and initial parameters.
"""

import argparse
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

for module in ("megatron", "torch"):  # their notes on optional packages; before they are imported
    warnings.filterwarnings("ignore", module=rf"{module}\..*")

import megatron_tikmix  # noqa: E402, F401  (first: it lets megatron-core do without CUDA)

# isort: split
import logging  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from influence_parts.statistics import mean_and_interval  # noqa: E402
from influence_parts.trained import write_json  # noqa: E402
from parity_parts import corpus  # noqa: E402
from parity_parts.start import Settings, configured  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from throughput_parts.plain import PlainLoop, Tokenizer, blended  # noqa: E402

from megatron_tikmix.config import RunConfig, load_config  # noqa: E402
from megatron_tikmix.data.builder import TrainingData  # noqa: E402
from megatron_tikmix.megatron.groups import initialize, shut_down  # noqa: E402
from megatron_tikmix.megatron.model import padded_vocab_size  # noqa: E402
from megatron_tikmix.training.build import build  # noqa: E402
from megatron_tikmix.training.loop import Run, measure, open_stage, reset_mixture, train_interval  # noqa: E402
from megatron_tikmix.training.record import Recorder  # noqa: E402

PAIRS, STEPS = 96, 10
PAIRS_PER_BOUNDARY = 24
TARGET = 0.97

# On indices that are not saved: so it is meant.
logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)


def figures_of(settings: Settings, share: float, pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    manifest = corpus.build(settings.work / "data")
    boundaries = pairs // PAIRS_PER_BOUNDARY
    iterations = PAIRS_PER_BOUNDARY * STEPS
    fields = {
        "train.train_iters": (boundaries + 2) * iterations,
        "train.micro_batch_size": 4,
        "train.log_interval": STEPS,
        # The first interval warms up: everything once, unmeasured.
        "remix.first_interval_samples": iterations * 16,
        "remix.interval_samples": iterations * 16,
        "data.manifest": str(manifest),
    }
    shutil.rmtree(settings.run_dir("ours"), ignore_errors=True)
    path = settings.work / "throughput.yaml"
    path.write_text(yaml.safe_dump(configured(settings, "ours", fields)), encoding="utf-8")
    config, resolved = load_config([str(path)])
    config.check(1)
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        data = TrainingData(config)
        run = build(config, data, Recorder(config, resolved, parallel), parallel)
        # A configuration of its own: megatron-core hangs hooks into it.
        plain = plain_loop(load_config([str(path)])[0], run, data)
        return interleaved(run, plain, share, boundaries, settings)
    finally:
        shut_down()


def plain_loop(config: RunConfig, run: Run, data: TrainingData) -> PlainLoop:
    manifest = data.manifest
    samples = config.train.consumed_samples(config.train.train_iters)
    prefixes = {name: manifest.split(name, "train").prefix for name in data.names}
    tokenizer = Tokenizer(manifest.vocab_size, manifest.eod)
    dataset = blended(prefixes, tokenizer, config.data.sequence_length, samples, config.seed)
    vocab_size = padded_vocab_size(manifest.vocab_size, config.model)
    return PlainLoop(config, dataset, run.parallel.groups, vocab_size)


def interleaved(
    run: Run, plain: PlainLoop, share: float, boundaries: int, settings: Settings
) -> dict[str, Any]:
    """Seconds of every turn and boundary, by the processor and by the clock."""
    open_stage(run, None, measure(run))
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    at_boundary: list[tuple[float, float]] = []

    def train() -> None:
        train_interval(run, until=run.state.iteration + STEPS)

    for _ in range(PAIRS_PER_BOUNDARY):
        train()
        plain.train(STEPS)
    reset_mixture(run, measure(run))  # the first one: what is made once is made
    assert run.probe_plan is not None
    probe_tokens = run.probe_plan.tokens
    for boundary in range(boundaries):
        for pair in range(PAIRS_PER_BOUNDARY):
            turns: list[tuple[list[tuple[float, float]], Callable[[], None]]] = [
                (ours, train),
                (theirs, lambda: plain.train(STEPS)),
            ]
            for seconds, work in turns if pair % 2 else turns[::-1]:
                seconds.append(timed(work))
        losses = measure(run)
        at_boundary.append(timed(lambda: reset_mixture(run, losses)))  # noqa: B023
        settings.say(f"{boundary + 1} of {boundaries} boundaries")
    tokens = STEPS * run.config.train.global_batch_size * run.config.data.sequence_length
    per_turn = np.mean(at_boundary, axis=0) * share * tokens / probe_tokens
    ours_2, theirs_2 = np.array(ours), np.array(theirs)
    ratios = {"excluded": theirs_2 / ours_2, "included": theirs_2 / (ours_2 + per_turn)}
    return {
        "pairs": len(ours),
        "steps": STEPS,
        "boundaries": boundaries,
        "share": share,
        "probe_tokens": probe_tokens,
        "tokens_per_turn": tokens,
        "tokens_per_second": {
            name: tokens / statistics.median(np.array(seconds)[:, 1])
            for name, seconds in (("ours", ours), ("plain", theirs))
        },
        "ratio": {
            name: {
                "processor": mean_and_interval(values[:, 0]),
                "clock": mean_and_interval(values[:, 1]),
            }
            for name, values in ratios.items()
        },
        "seconds": {"ours": ours, "plain": theirs, "boundary": at_boundary},
        "last_loss": {"plain": plain.losses[-1]},
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of this process's processors, and of the clock."""
    clock, busy = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.process_time() - busy, time.perf_counter() - clock


def table(figures: dict[str, Any]) -> Table:
    table = Table("boundaries", "ratio by processor time", "ratio by the clock")
    table.title = (
        f"Plain loop's seconds by ours: {figures['pairs']} pairs of {figures['steps']} steps, 95 %"
    )
    for name, ratio in figures["ratio"].items():
        cells = [
            f"{r['mean']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
            for r in (ratio["processor"], ratio["clock"])
        ]
        label = name if name == "excluded" else f"included, {figures['share']:.1%} of tokens probed"
        table.add_row(label, *cells)
    return table


def missed(figures: dict[str, Any]) -> list[str]:
    """By processor time: the clock of a machine that does other things too says little."""
    return [
        f"boundaries {name}: the ratio's interval begins at {ratio['processor']['low']:.3f}; "
        f"the target is {TARGET}"
        for name, ratio in figures["ratio"].items()
        if not ratio["processor"]["low"] >= TARGET
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--share", type=float, default=0.01, help="probe's tokens by an interval's (default 0.01)")
    add("--pairs", type=int, default=PAIRS, help=f"pairs of turns (default {PAIRS})")
    add("--check", action="store_true", help=f"exit 1 if an interval begins below {TARGET}")
    add("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    add(
        "--work",
        type=Path,
        default=Path("runs/benchmarks/throughput"),
        metavar="DIR",
        help="data and the run (default: runs/benchmarks/throughput)",
    )
    options = parser.parse_args()
    if options.pairs < 2 * PAIRS_PER_BOUNDARY:
        parser.error(f"--pairs must be {2 * PAIRS_PER_BOUNDARY} or more")
    figures = figures_of(Settings(options.work.resolve()), options.share, options.pairs)
    console, problems = Console(), missed(figures)
    console.print(table(figures))
    for text in problems:
        console.print(f"missed: {text}", style="red", markup=False)
    if options.json:
        write_json(options.json, figures)
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
