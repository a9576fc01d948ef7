"""What looking at a run costs it: the share of its time that goes into records and charts.

    python benchmarks/monitoring.py              the table
    python benchmarks/monitoring.py --check      exit 1 if monitoring takes 1% of step time or more
    python benchmarks/monitoring.py --json FILE  the same figures, for a script

Real runs under cProfile, one rank, which is the one that writes: the quickstart's model on random
tokens, on a few domains and on many, logging every 10 iterations, with a boundary half-way (of many
domains without a probe, which takes minutes there, so without a matrix to show). Counted as
monitoring is all that would not be done if nobody looked: files, TensorBoard and terminal, each
domain's count of samples, and memory. Time is CPU time of the process. A profiler slows Python's
calls and not what they call in C, so the shares are upper bounds; the model is so small that its
steps are short, which raises them too.
"""

import argparse
import cProfile
import json
import multiprocessing
import os
import pstats
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MOST = 0.01
"""Share of step time that the issue allows."""

VOCAB_SIZE, MOST_PROBED = 2048, 30
STEP = ("step", "realised_mixture", "drawn", "peak_memory_bytes")
BOUNDARY = ("stage", "evaluation", "probing", "rolling_out", "probe_estimate")
FILES = ("training/record.py", "training/loop.py")


def write_corpus(folder: Path, domains: int) -> Path:
    """Random tokens; monitoring does not read them."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from megatron_tikmix.data.domains import DomainManifest, DomainSplit

    rng = np.random.default_rng(0)
    found: dict[str, dict[str, DomainSplit]] = {}
    for d in range(domains):
        name = f"domain_{d:03d}"
        found[name] = {}
        for split, documents in (("train", 60), ("validation", 12)):
            prefix = folder / f"{name}_{split}"
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for _ in range(documents):
                tokens = np.append(rng.integers(1, VOCAB_SIZE, 400), 0)
                builder.add_item(torch.from_numpy(tokens))
                builder.end_document()
            builder.finalize(f"{prefix}.idx")
            found[name][split] = DomainSplit(prefix, documents, 401 * documents)
    manifest = DomainManifest(folder / "domains.yaml", None, VOCAB_SIZE, 0, found)
    manifest.save()
    return manifest.path


def profiled(domains: int, iterations: int) -> dict[str, float]:
    """CPU seconds of one run, by what they went into."""
    from megatron_tikmix.config import load_config
    from megatron_tikmix.training.build import pretrain

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        names = [f"domain_{d:03d}" for d in range(4)]
        interval = 16 * iterations // 2  # one boundary, half-way
        arguments: dict[str, Any] = {
            "run_dir": folder / "run",
            "data.manifest": write_corpus(folder, domains),
            "tasks": json.dumps({name: {"domain": name} for name in names}),
            "train.train_iters": iterations,
            "optimizer.adam_beta2": 0.8,
            "remix.policy": "tikmix_d" if domains <= MOST_PROBED else "static",
            "remix.first_interval_samples": interval,
            "remix.interval_samples": interval,
            "probe.sub_batch_samples": 4,
            "probe.task_samples": 16,
            "probe.max_overhead": "null",
            "evaluate.task_samples": 16,
        }
        options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
        config, resolved = load_config([str(ROOT / "examples" / "quickstart.yaml"), *options])
        profile = cProfile.Profile(time.process_time)
        profile.runcall(pretrain, config, resolved)
    return _seconds(pstats.Stats(profile))


def _seconds(stats: pstats.Stats) -> dict[str, float]:
    """Cumulative time of the functions that matter, from a profile of a whole run."""
    by_name: dict[tuple[str, str], float] = {}
    for (file, _, name), (*_, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        for ours in FILES:
            if file.endswith(ours):
                by_name[ours, name] = by_name.get((ours, name), 0.0) + cumulative
    recorder, loop = ({k[1]: v for k, v in by_name.items() if k[0] == file} for file in FILES)
    # The loop's own `peak_memory_bytes` waits for other ranks, too: of one, for nobody.
    in_step = recorder["step"] + sum(loop.get(name, 0.0) for name in STEP[1:])
    return {
        "training": loop["train"],
        "steps": loop["train_interval"],
        "monitoring of steps": in_step,
        "monitoring of boundaries": sum(recorder.get(name, 0.0) for name in BOUNDARY),
    }


def measure(domains: int, iterations: int) -> dict[str, float]:
    """The figures of one number of domains, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        seconds = pool.submit(profiled, domains, iterations).result()
    watched = seconds["monitoring of steps"] + seconds["monitoring of boundaries"]
    return {
        "domains": domains,
        "iterations": iterations,
        "ms per step": 1000 * seconds["steps"] / iterations,
        "monitoring, ms per step": 1000 * seconds["monitoring of steps"] / iterations,
        "share of step time": seconds["monitoring of steps"] / seconds["steps"],
        "ms at a boundary": 1000 * seconds["monitoring of boundaries"],
        "share of all training": watched / seconds["training"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", type=int, nargs="+", default=[6, 200], help="default: 6 200")
    parser.add_argument("--iterations", type=int, default=200, help="of each run (default: 200)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rows = [measure(domains, arguments.iterations) for domains in arguments.domains]
    table = Table(*rows[0], title="monitoring")
    for row in rows:
        table.add_row(*(_written(name, value) for name, value in row.items()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    missed = [row for row in rows if row["share of step time"] >= MOST]
    for row in missed:
        share = row["share of step time"]
        print(f"missed: {share:.2%} of step time at {row['domains']:g} domains", file=sys.stderr)
    return 1 if arguments.check and missed else 0


def _written(name: str, value: float) -> str:
    if name.startswith("share"):
        return f"{value:.2%}"
    return f"{value:.2f}" if "ms" in name else f"{value:g}"


if __name__ == "__main__":
    sys.exit(main())
