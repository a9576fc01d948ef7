"""TiKMiX-M against TiKMiX-D where gains saturate: which ends closer to the true optimum?

Synthetic tasks whose gain saturates in each weight, as training's does:

    f_i(w) = Σ_j a_ij (1 − exp(−λ w_j)) / λ      λ = the number of domains

D sees the gradient of f at the prior, which is what a probe of the influence finds there, without
noise. M sees it too, and rollouts: f at its candidates, with noise of 5% of their spread. The true
optimum is that of TiKMiX's objective L with f itself for the gains, found by SLSQP from many
starts; gains are in units in which the prior gains what its influence says. No constraints.

The figures: total variation (½ Σ |w − optimum|) and excess of L over the optimum's, both means over
seeds, and in how many seeds M is closer than D. Each row of M has the number of rollouts.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Goal
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d
from megatron_tikmix.solve.tikmix_m import solve_tikmix_m

Array = NDArray[np.float64]

FREE = MixtureConstraints()
NOISE = 0.05
CASES = [(8, 4, 1.0), (8, 4, 0.5), (26, 9, 1.0)]
"""Domains, tasks, and the weight of the diversity, γ."""
ROLLOUTS = (32, 64, 128)


@dataclass(frozen=True, eq=False)
class Saturating:
    """One draw of the tasks."""

    worth_VD: Array
    prior_D: Array
    gamma: float

    @classmethod
    def drawn(cls, domains: int, tasks: int, gamma: float, seed: int) -> "Saturating":
        rng = np.random.default_rng(seed)
        worth_VD = rng.exponential(size=(tasks, domains)) * (rng.random((tasks, domains)) < 0.6)
        worth_VD[:, 0] += 0.3  # so that no task is without a gain
        worth_VD[:, -1] = 0.0  # and one domain is noise
        return cls(worth_VD, rng.dirichlet(np.full(domains, 5.0)), gamma)

    @property
    def rate(self) -> float:
        return float(len(self.prior_D))

    @property
    def slopes_VD(self) -> Array:
        slopes_VD: Array = self.worth_VD * np.exp(-self.rate * self.prior_D)
        return slopes_VD

    def gains(self, weights_ND: Array) -> Array:
        gains_NV: Array = (1 - np.exp(-self.rate * weights_ND)) @ self.worth_VD.T / self.rate
        return gains_NV

    def objective(self, weights_D: Array) -> float:
        """L with the true gains, written out once more."""
        linear_V = self.slopes_VD @ self.prior_D / self.slopes_VD.max(axis=1)
        gains_V = linear_V / self.gains(self.prior_D) * self.gains(weights_D)
        positive_D = weights_D.clip(min=1e-12)
        entropy = -(positive_D * np.log(positive_D)).sum()
        return float(gains_V.std() - 4 * gains_V.mean() - self.gamma * entropy)

    def optimum(self) -> Array:
        """The best of ten descents."""
        D = len(self.prior_D)
        starts = np.vstack([self.prior_D, np.random.default_rng(0).dirichlet(np.ones(D), 9)])
        total: Any = {"type": "eq", "fun": lambda w: w.sum() - 1}
        found = [
            minimize(
                self.objective,
                start,
                bounds=[(0, 1)] * D,
                constraints=[total],
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-12},
            )
            for start in starts
        ]
        best: Array = min(found, key=lambda answer: float(answer.fun)).x
        return best

    def answers(self, seed: int) -> dict[str, Array]:
        """What each method makes of it, by its name."""
        names = [f"domain{d:02}" for d in range(len(self.prior_D))]
        tasks = [f"task{v}" for v in range(len(self.worth_VD))]
        influence = InfluenceMatrix(self.slopes_VD, domains=names, tasks=tasks)
        prior = Mixture(dict(zip(names, self.prior_D.tolist(), strict=True)))
        rng = np.random.default_rng([seed, 1])

        def outcomes(weights_ND: Array) -> Array:
            gains_NV = self.gains(weights_ND)
            noise_NV = rng.normal(size=gains_NV.shape)
            return gains_NV + NOISE * gains_NV.std(axis=0) * noise_NV

        goal = Goal(gamma=self.gamma)
        d = solve_tikmix_d(influence, prior, goal, FREE)
        answers = {"prior": self.prior_D, "TiKMiX-D": d.mixture.array()}
        for rollouts in ROLLOUTS:
            m = solve_tikmix_m(
                influence,
                prior,
                goal,
                FREE,
                measure=outcomes,
                candidates=rollouts,
                seed=seed,
            )
            answers[f"TiKMiX-M, {rollouts} rollouts"] = m.mixture.array()
        return answers


def measure(seeds: int) -> list[dict[str, Any]]:
    rows = []
    for domains, tasks, gamma in CASES:
        distances: dict[str, list[float]] = {}
        excesses: dict[str, list[float]] = {}
        for seed in range(seeds):
            case = Saturating.drawn(domains, tasks, gamma, seed)
            optimum_D = case.optimum()
            least = case.objective(optimum_D)
            for method, weights_D in case.answers(seed).items():
                distance = float(0.5 * np.abs(weights_D - optimum_D).sum())
                distances.setdefault(method, []).append(distance)
                excesses.setdefault(method, []).append(case.objective(weights_D) - least)
        for method in distances:
            closer = np.array(distances[method]) < np.array(distances["TiKMiX-D"])
            rows.append(
                {
                    "domains": domains,
                    "tasks": tasks,
                    "gamma": gamma,
                    "method": method,
                    "distance": float(np.mean(distances[method])),
                    "excess": float(np.mean(excesses[method])),
                    "closer_than_d": int(closer.sum()),
                    "seeds": seeds,
                    "distances": distances[method],
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Distance from the true optimum where gains saturate")
    for heading in ("domains × tasks", "γ", "method", "distance", "excess of L", "closer than D"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(
            f"{row['domains']} × {row['tasks']}",
            f"{row['gamma']:g}",
            row["method"],
            f"{row['distance']:.3f}",
            f"{row['excess']:.3f}",
            "" if row["method"] == "TiKMiX-D" else f"{row['closer_than_d']} of {row['seeds']}",
            end_section=row["method"].endswith(f"{ROLLOUTS[-1]} rollouts"),
        )
    Console(width=100).print(table)


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Where M is on average not closer than D, in words."""
    of_d = {
        (row["domains"], row["gamma"]): row["distance"]
        for row in rows
        if row["method"] == "TiKMiX-D"
    }
    return [
        f"{row['domains']} domains, γ = {row['gamma']:g}, {row['method']}: {row['distance']:.3f}"
        for row in rows
        if row["method"].startswith("TiKMiX-M")
        and row["distance"] >= of_d[row["domains"], row["gamma"]]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=6,
        help="draws of the tasks to average over (default: %(default)s, some 10 minutes)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 unless M is closer than D on average, in every case",
    )
    arguments = parser.parse_args()
    rows = measure(arguments.seeds)
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    failures = missed(rows)
    for failure in failures:
        print(f"not closer than TiKMiX-D: {failure}", file=sys.stderr)
    return 1 if arguments.check and failures else 0


if __name__ == "__main__":
    sys.exit(main())
