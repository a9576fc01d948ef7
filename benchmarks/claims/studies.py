"""The paper's studies: does influence say how a mixture ends, and do preferences drift?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from claims import searches
from claims.runs import Experiment, Result, Runner

Array = NDArray[np.float64]

ADVICE = {"remix.policy": "tikmix_d", "remix.mode": "advise"}
"""Measure at every boundary, and stay on the initial mixture."""


def outcome_study(runner: Runner, domains: Sequence[str]) -> dict[str, Any]:
    """Influence of a mixture against the loss that a whole run on it ends with.

    Source: paper, figure of total Group Influence against scores (r = 0.789 with 10 mixtures).
    Influence is measured along one run on the uniform mixture, of another seed than the whole
    runs, and averaged over its boundaries; the mixtures were drawn before either.

    Keys: `influence` and `loss` (N,), `r` with `low` and `high` (Fisher's 95%), the same
    `without_junk_heavy` (mixtures with less junk than the uniform one), and `log`: r where each
    task's influence counts by its logarithm.
    """
    profile, tasks = runner.profile, runner.profile.tasks
    mixtures, results = searches.whole_runs(runner, domains)
    advice = runner([Experiment(policy="advice", seed=profile.search_seed + 10, settings=ADVICE)])[
        0
    ]
    rows_VD = mean_rows(advice, tasks, domains)
    weights_ND = np.array([[mixture[name] for name in domains] for mixture in mixtures])
    gains_NV = weights_ND @ rows_VD.T
    loss_N = np.array([searches.mean_loss(result, tasks) for result in results])
    junk_N = weights_ND[:, [name in profile.junk for name in domains]].sum(axis=1)
    few = junk_N <= len(profile.junk) / len(domains)
    influence_N = gains_NV.mean(axis=1)
    logs_N = np.log(np.maximum(gains_NV, 0.01)).mean(axis=1)
    return {
        "mixtures": mixtures,
        "influence": influence_N.tolist(),
        "loss": loss_N.tolist(),
        "junk": junk_N.tolist(),
        "all": correlation(influence_N, -loss_N),
        "without_junk_heavy": correlation(influence_N[few], -loss_N[few]),
        "log": correlation(logs_N, -loss_N),
    }


def mean_rows(result: Result, tasks: Sequence[str], domains: Sequence[str]) -> Array:
    """Normalised rows S_ij / max_j |S_ij|, averaged over a run's boundaries; (V, D)."""
    matrices = [stage["influence"] for stage in result["stages"] if stage["influence"]]
    rows_KVD = np.array([[[m[task][d] for d in domains] for task in tasks] for m in matrices])
    mean_VD: Array = (rows_KVD / np.abs(rows_KVD).max(axis=2, keepdims=True)).mean(axis=0)
    return mean_VD


def correlation(x_N: Array, y_N: Array) -> dict[str, float]:
    """Pearson's r with Fisher's 95% interval, and how many points."""
    r = float(np.corrcoef(x_N, y_N)[0, 1])
    half = 1.96 / np.sqrt(max(len(x_N) - 3, 1))
    low, high = np.tanh(np.arctanh(r) - half), np.tanh(np.arctanh(r) + half)
    return {"r": r, "low": float(low), "high": float(high), "n": len(x_N)}


def drift_study(runner: Runner) -> dict[str, Any]:
    """Rank stability between consecutive boundaries, with its ceiling, for two sizes of model.

    Runs stay on the uniform mixture, so that only the model changes. The first version of the
    paper says that preferences drift, the second that their ranking stays.
    """
    profile = runner.profile
    sizes: dict[str, Mapping[str, Any]] = {"model": {}}
    if profile.smaller_model:
        sizes["smaller model"] = profile.smaller_model
    found = {}
    for name, settings in sizes.items():
        runs = runner(
            [
                Experiment(policy=f"advice, {name}", seed=seed, settings={**ADVICE, **settings})
                for seed in profile.seeds[: profile.ablation_seeds]
            ]
        )
        found[name] = {
            "loss": float(np.mean([searches.mean_loss(run, profile.tasks) for run in runs])),
            "boundaries": _by_boundary(runs, profile.tasks),
        }
    return found


def _by_boundary(runs: Sequence[Result], tasks: Sequence[str]) -> list[dict[str, float]]:
    """Mean over runs and tasks of correlation and ceiling, at each boundary after the first."""
    rows = []
    for stages in zip(*(run["stages"] for run in runs), strict=True):
        stable = [stage["rank_stability"] for stage in stages if stage["rank_stability"]]
        if not stable:
            continue
        rows.append(
            {
                "iteration": stages[0]["start_iteration"],
                **{
                    key: float(np.mean([s[key][t] for s in stable for t in tasks if s[key][t]]))
                    for key in ("correlation", "ceiling")
                },
            }
        )
    return rows
