"""Does influence predict what training then does? Short real continuations, 24 mixtures.

Predicted: Σ_j w_j S_j. Realised: the drop of each task's loss after 40 optimizer steps on the
mixture, from the same state, with common random numbers. The ceiling of r is that of the realised
side, √(r of two repetitions on different samples), the mean of both taken.
"""

import json

import numpy as np
from rich.table import Table

from influence_parts.statistics import Array, bootstrap, correlations
from influence_parts.trained import (
    Figures,
    Settings,
    Trained,
    large_bank,
    trained,
    write_json,
)

MIXTURES = 24
ITERATIONS = 40
REPETITIONS = 2
SUB_BATCHES = 128
SKETCH = {"identity": 0.77, "adam": 0.82}
"""Mean over tasks of a first sketch, the reference."""


def measure(settings: Settings) -> Figures:
    with trained(settings) as found:
        domains, tasks = found.data.names, [task.name for task in found.data.tasks]
        weights_ND = np.random.default_rng(0).dirichlet(np.ones(len(domains)), MIXTURES)
        drops_RNV = np.array(
            [drops(settings, found, weights_ND, number) for number in range(REPETITIONS)]
        )
        matrices = {
            curvature: large_bank(
                settings,
                found,
                sub_batches=SUB_BATCHES,
                sub_batch_samples=4,
                seed=2,
                curvature=curvature,
            )
            .influence_matrix()
            .values_VD
            for curvature in SKETCH
        }
    matrices |= of_kronfluence(settings, domains)
    realised_NV = drops_RNV.mean(axis=0)
    predicted = {name: weights_ND @ S_VD.T for name, S_VD in matrices.items()}
    # Spearman–Brown: what two repetitions' mean would correlate with another such mean.
    single_V = np.clip(correlations(*drops_RNV[:2]), 0, None)
    return {
        "tasks": tasks,
        "mixtures": MIXTURES,
        "iterations": ITERATIONS,
        "ceiling": np.sqrt(2 * single_V / (1 + single_V)).tolist(),
        "linear_fit": leave_one_out(weights_ND, realised_NV).tolist(),
        "by": {name: agreement(values_NV, realised_NV) for name, values_NV in predicted.items()},
        "better_than_identity": {
            name: gain(values_NV, predicted["identity"], realised_NV)
            for name, values_NV in predicted.items()
            if name != "identity"
        },
    }


def drops(settings: Settings, found: Trained, weights_ND: Array, repetition: int) -> Array:
    """The drop of each task's loss on each mixture, (N, V), kept once it is there."""
    path = settings.work / "banks" / f"drops-{MIXTURES}-{ITERATIONS}-{repetition}.json"
    if not path.is_file():
        what = f"{MIXTURES} continuations of {ITERATIONS} iterations"
        settings.say(f"{what}, repetition {repetition + 1} of {REPETITIONS} …")
        rollouts = found.rollouts(lambda done, total: settings.say(f"  {done} of {total}"))
        outcomes = rollouts.measure(weights_ND, seed=5 + repetition, iters=ITERATIONS)
        settings.say(f"  {outcomes.seconds:.0f} s")
        write_json(path, outcomes.outcomes_NV.tolist())
    return np.array(json.loads(path.read_text(encoding="utf-8")))


def of_kronfluence(settings: Settings, domains: list[str]) -> dict[str, Array]:
    """kronfluence's EK-FAC matrix, and ours of the same linear layers and samples, if that part
    was run before."""
    path = settings.work / "kronfluence.json"
    if not path.is_file():
        return {}
    figures = json.loads(path.read_text(encoding="utf-8"))
    columns = [figures["domains"].index(name) for name in domains]
    labels = {
        "identity": "identity, linear layers",
        "adam": "adam, linear layers",
        "kronfluence_ekfac": "EK-FAC, linear layers",
    }
    methods = figures["methods"]
    return {
        label: np.array(methods[method]["influence_VD"])[:, columns]
        for method, label in labels.items()
    }


def agreement(predicted_NV: Array, realised_NV: Array) -> Figures:
    """r of each task, (V,), and its mean, with bootstrap intervals over mixtures."""

    def both(a_NV: Array, b_NV: Array) -> Array:
        r_V = correlations(a_NV, b_NV)
        return np.append(r_V, r_V.mean())

    r, (low, high) = both(predicted_NV, realised_NV), bootstrap(both, predicted_NV, realised_NV)
    return {"r": r.tolist(), "low": low.tolist(), "high": high.tolist()}


def gain(a_NV: Array, b_NV: Array, realised_NV: Array) -> dict[str, float]:
    """By how much `a` has the higher mean r, on the same bootstrap draws."""

    def difference(*rows: Array) -> Array:
        return np.array(correlations(rows[0], rows[2]).mean() - correlations(*rows[1:]).mean())

    rows = (a_NV, b_NV, realised_NV)
    low, high = bootstrap(difference, *rows)
    return {"gain": float(difference(*rows)), "low": float(low), "high": float(high)}


def leave_one_out(weights_ND: Array, realised_NV: Array) -> Array:
    """r of a linear fit on the other mixtures' realised drops: what any linear prediction can
    hope for, (V,)."""
    predicted = []
    for n in range(len(weights_ND)):
        others = np.arange(len(weights_ND)) != n
        fit, *_ = np.linalg.lstsq(weights_ND[others], realised_NV[others], rcond=None)
        predicted.append(weights_ND[n] @ fit)
    return correlations(np.array(predicted), realised_NV)


def tables(figures: Figures) -> list[Table]:
    table = Table(
        "predicted by",
        title=f"r with the drop realised after {figures['iterations']} iterations, "
        f"{figures['mixtures']} mixtures, and 95% bootstrap intervals",
    )
    for task in [*figures["tasks"], "mean"]:
        table.add_column(task, justify="right")
    for name, row in figures["by"].items():
        cells = zip(row["r"], row["low"], row["high"], strict=True)
        table.add_row(name, *(f"{r:.2f}\n{low:.2f} to {high:.2f}" for r, low, high in cells))
    for name, key in (("linear fit, left out", "linear_fit"), ("ceiling", "ceiling")):
        values = figures[key]
        table.add_row(name, *(f"{r:.2f}" for r in [*values, float(np.mean(values))]))
    table.caption = "better than identity, in mean r: " + "; ".join(
        f"{name} by {row['gain']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
        for name, row in figures["better_than_identity"].items()
    )
    return [table]


def missed(figures: Figures) -> list[str]:
    """A prediction must be better than none: the interval of its mean r above 0."""
    return [
        f"{name}: the interval of the mean r begins at {row['low'][-1]:.2f}"
        for name, row in figures["by"].items()
        if row["low"][-1] <= 0
    ]
