"""How fast TiKMiX-D is solved, and how surely: sizes from the paper's to a thousand domains.

    python benchmarks/solvers.py              the table
    python benchmarks/solvers.py --check      exit 1 if a figure of the targets is missed
    python benchmarks/solvers.py --json FILE  the same figures, for a script

Every size is solved within Pareto and a largest change of 0.25; where it says
"cones", Pareto is held at a confidence of 0.95 given standard errors. Beside it stands plain
SLSQP with numerical gradients, as the paper's text suggests it, on the same problem and machine:
its time as a multiple of ours, and how far above the optimum it stops.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import LinearConstraint, minimize

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Goal, Objective
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d

TARGETS = {(26, 9): 0.020, (1000, 100): 2.0}
"""Seconds that the issue allows, by (domains, tasks), without cones."""


def problem(D: int, V: int, seed: int) -> tuple[InfluenceMatrix, Mixture]:
    """Influence of a common part and a part of each task's own, and a random prior."""
    rng = np.random.default_rng(seed)
    values_VD = rng.normal(size=D) + rng.normal(size=(V, D))
    names = [f"domain{d:05}" for d in range(D)]
    prior = Mixture(dict(zip(names, rng.dirichlet(np.ones(D)).tolist(), strict=True)))
    influence = InfluenceMatrix(
        values_VD,
        domains=names,
        tasks=[f"task{v:03}" for v in range(V)],
        standard_error_VD=0.1 * rng.uniform(0.5, 1.5, (V, D)),
        degrees_of_freedom=7,
    )
    return influence, prior


def plain_slsqp(influence: InfluenceMatrix, prior: Mixture, budget_s: float) -> tuple[float, bool]:
    """SLSQP as a first implementation has it: w itself, numerical gradients, from uniform, the
    total variation smoothed. L of its answer, and whether it ended within the budget."""
    objective, prior_D = Objective.of(influence.values_VD), prior.array()
    started = time.perf_counter()

    def value(w_D: np.ndarray) -> float:
        return objective.value(w_D.clip(min=0))

    def stop(_: Any) -> None:
        if time.perf_counter() - started > budget_s:
            raise StopIteration

    def room(w_D: np.ndarray) -> float:
        return 0.25 - 0.5 * float(np.sqrt((w_D - prior_D) ** 2 + 1e-12).sum())

    settings: dict[str, Any] = {
        "method": "SLSQP",
        "bounds": [(0, 1)] * len(prior_D),
        "constraints": [
            LinearConstraint(np.ones((1, len(prior_D))), 1, 1),
            LinearConstraint(objective.rows_VD, objective.rows_VD @ prior_D, np.inf),
            {"type": "ineq", "fun": room},
        ],
        "options": {"maxiter": 500},
        "callback": stop,
    }
    start_D = np.full(len(prior_D), 1 / len(prior_D))
    answer = minimize(value, start_D, **settings)
    return objective.value(answer.x.clip(min=0)), time.perf_counter() - started <= budget_s


def timed(solve: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Median seconds and the last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = solve()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def measure(D: int, V: int, cones: bool, repeats: int, plain_budget_s: float) -> dict[str, Any]:
    influence, prior = problem(D, V, seed=0)
    constraints = MixtureConstraints(
        max_total_variation=0.25, pareto=True, confidence=0.95 if cones else None
    )
    seeds = range(repeats if D <= 100 else 1)
    solutions, seconds = [], []
    for seed in seeds:
        case = problem(D, V, seed)
        solve = partial(solve_tikmix_d, *case, Goal(), constraints)
        took, solution = timed(solve, repeats if D <= 1000 else 1)
        seconds.append(took)
        solutions.append(solution)
    certificates = [s.certificate for s in solutions if s.certificate is not None]
    row = {
        "domains": D,
        "tasks": V,
        "cones": cones,
        "solver": solutions[0].solver,
        "problems": len(seeds),
        "seconds": statistics.median(seconds),
        "seconds_worst": max(seconds),
        "gap": max((c.gap for c in certificates), default=None),
        "violation": max((c.violation for c in certificates), default=None),
        "certified": len(certificates) == len(solutions) and all(c.holds for c in certificates),
        "plain_slsqp_ratio": None,
        "plain_slsqp_excess": None,
        "plain_slsqp_ended": None,
    }
    if plain_budget_s and not cones:
        plain_seconds, (value, ended) = timed(
            lambda: plain_slsqp(influence, prior, plain_budget_s), 1
        )
        row["plain_slsqp_ratio"] = plain_seconds / seconds[0]
        row["plain_slsqp_excess"] = value - solutions[0].objective
        row["plain_slsqp_ended"] = ended
    return row


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="TiKMiX-D: median time of a solution, worst gap and violation")
    for column in ("D × V", "Pareto", "solver", "ms", "duality gap", "violation", "plain SLSQP"):
        table.add_column(column, justify="left" if column in ("Pareto", "solver") else "right")
    for row in rows:
        plain = "—"
        if row["plain_slsqp_ratio"] is not None:
            plain = f"{row['plain_slsqp_ratio']:.0f} × the time"
            plain += "" if row["plain_slsqp_ended"] else ", stopped"
            plain += f", L + {row['plain_slsqp_excess']:.1e}"
        table.add_row(
            f"{row['domains']:,} × {row['tasks']}",
            "cones" if row["cones"] else "linear",
            row["solver"],
            f"{1000 * row['seconds']:.1f} (≤ {1000 * row['seconds_worst']:.1f})",
            f"{row['gap']:.1e}" if row["certified"] else "not certified",
            f"{row['violation']:.1e}" if row["certified"] else "",
            plain,
        )
    return table


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Targets that these figures miss."""
    problems = []
    for row in rows:
        size = (row["domains"], row["tasks"])
        if not row["certified"]:
            problems.append(f"{size} is not certified")
        limit = TARGETS.get(size)
        if limit is not None and not row["cones"] and row["seconds"] > limit:
            problems.append(f"{size} took {row['seconds']:.3f} s; the target is {limit} s")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON")
    parser.add_argument("--check", action="store_true", help="exit 1 if a target is missed")
    parser.add_argument("--repeats", type=int, default=5, help="solutions timed per size")
    parser.add_argument(
        "--plain_budget_s",
        type=float,
        default=60.0,
        help="plain SLSQP is stopped after so many seconds a size (0: left out)",
    )
    options = parser.parse_args()
    sizes = [(26, 9, False), (26, 9, True), (100, 30, False), (100, 30, True), (1000, 100, False)]
    sizes += [(10_000, 20, False)]
    rows = []
    console = Console()
    for D, V, cones in sizes:
        console.print(f"{D:,} domains × {V} tasks …", style="dim")
        budget = options.plain_budget_s if D <= 1000 else 0.0
        rows.append(measure(D, V, cones, options.repeats, budget))
    console.print(table_of(rows))
    if options.json:
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    problems = missed(rows)
    for text in problems:
        console.print(f"missed: {text}", style="red")
    return 1 if options.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
