"""What a decision costs as a run grows: stages 15 and 300 beside stage 1, in one process.

  OMP_NUM_THREADS=1 python benchmarks/decision_time.py [--domains 200] [--tasks 9] [--check]

Joint influence, smoothing 0.5 and the noise test, as a run decides by default; banks are drawn at
random and lie in files, as in a run. "in a run" decides with former boundaries read before;
"resumed" is the first decision after a start, which reads and fits them all.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_tikmix.config import RemixConfig
from megatron_tikmix.decision.decide import Boundary, Decider
from megatron_tikmix.decision.ledger import BankFile, Measured, StageRow
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import OWN_ROW
from megatron_tikmix.mixture.mixture import Mixture

STAGES = (1, 15, 300)
READ = 64
"""Banks are drawn anew for so many stages before the one decided; earlier ones are never read."""

MOST = 1.3


def bank_of(rng: np.random.Generator, truth_VD: np.ndarray, own_DD: np.ndarray) -> SubBatchBank:
    """A probe of 8 sub-batches a domain."""
    V, D = truth_VD.shape
    domains = [f"d{d:03}" for d in range(D)]
    tasks = [*(f"t{v}" for v in range(V)), *(OWN_ROW + domain for domain in domains)]
    rows_RD = np.vstack([truth_VD, own_DD])
    sums_DBR = rows_RD.T[:, None, :] + 0.2 * rng.normal(size=(D, 8, len(tasks)))
    return SubBatchBank(64.0 * sums_DBR, np.full((D, 8), 64.0), domains, tasks)


def measure(domains: int, tasks: int) -> list[dict[str, Any]]:
    """Seconds of the decision at each of `STAGES`."""
    rng = np.random.default_rng(0)
    factors_DK = rng.normal(size=(domains, 12))
    truth_VD = np.abs(rng.normal(size=(tasks, 12)) @ factors_DK.T) / 4
    own_DD = factors_DK @ factors_DK.T / 12 + np.eye(domains)
    names = [f"d{d:03}" for d in range(domains)]
    prior = Mixture.uniform(names).rounded()
    with tempfile.TemporaryDirectory() as folder:
        banks = [
            BankFile.written(Path(folder), number, Measured(bank_of(rng, truth_VD, own_DD)))
            for number in range(READ)
        ]
        now = bank_of(rng, truth_VD, own_DD)

        def row(stage: int) -> StageRow:
            measured = banks[stage % READ] if stage else None
            return StageRow(
                stage=stage,
                start_iteration=stage,
                start_sample=stage,
                weights=prior,
                measured=measured,
            )

        rows = []
        for stage in STAGES:
            decider = Decider(
                RemixConfig(),
                seed=1,
                task_weights=dict.fromkeys((f"t{v}" for v in range(tasks)), 1.0),
                samples_per_epoch=dict.fromkeys(names, 1000),
            )
            seconds = []
            for at_stage in (stage, stage + 1):
                at = Boundary(
                    stage=at_stage,
                    iteration=at_stage,
                    prior=prior,
                    consumed=dict.fromkeys(names, 10),
                    interval_samples=1000,
                    ledger=[row(each) for each in range(at_stage)],
                )
                started = time.perf_counter()
                decider.decide(now, at)
                seconds.append(time.perf_counter() - started)
            rows.append({"stage": stage, "resumed": seconds[0], "in_a_run": seconds[1]})
    first = rows[0]["in_a_run"]
    return [each | {"ratio": each["in_a_run"] / first} for each in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains", type=int, default=200)
    parser.add_argument("--tasks", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--check", action="store_true", help=f"exit 1 where a ratio is above {MOST}"
    )
    options = parser.parse_args(argv)
    rows = measure(options.domains, options.tasks)
    table = Table(title=f"Seconds of a decision, {options.domains} domains, {options.tasks} tasks")
    for head in ("stage", "in a run", "over stage 1", "resumed"):
        table.add_column(head, justify="right")
    for row in rows:
        figures = (row["in_a_run"], row["ratio"], row["resumed"])
        table.add_row(str(row["stage"]), *(f"{figure:.2f}" for figure in figures))
    Console(width=100).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [row for row in rows if row["ratio"] > MOST]
    for row in missed:
        print(
            f"MISSED: stage {row['stage']} costs {row['ratio']:.2f} times stage 1", file=sys.stderr
        )
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
