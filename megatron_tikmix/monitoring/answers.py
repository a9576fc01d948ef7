"""Answers to questions about a run, as plain values: for tables, for JSON, and in words.

Every answer is made from the run directory alone, at any time during the run. Unknown numbers are
None.
"""

from typing import Any

import numpy as np

from megatron_tikmix.decision.explain import Explainer, Explanation
from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring.files import RunFiles
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.words import (
    Influence,
    clean,
    cost_in_words,
    moves,
    number,
    percent,
    sentence,
)

Answer = dict[str, Any]
PLACES = ("run_dir", "baseline")
"""Settings that only name directories, and are not compared between runs."""


def open_run(run_dir: str) -> RunHistory:
    """Return the run in this directory.

    Raises:
        InputError: there is none, it has no stage of a mixture yet, or a file of it is damaged.
    """
    history = RunHistory(RunFiles(run_dir))
    if not history.stages:
        raise InputError(
            f"{run_dir} has no mixture.jsonl with a stage in it: give a run's run_dir, or wait "
            "until its training has begun"
        )
    return history


def summary(history: RunHistory) -> Answer:
    """Return the run's progress, the change of its mixture at each boundary, and the cost."""
    return {
        "words": in_words(history),
        "iteration": history.iteration,
        "iterations": history.setting("train", "train_iters"),
        "tokens": tokens(history, history.samples),
        "domains": len(history.domains),
        "task_losses": {str(at): losses for at, losses in history.task_losses.items()},
        "mean_task_loss": {str(at): mean for at, mean in history.mean_task_loss.items()},
        "probe_token_share": history.probe_token_share,
        "probe_time_share": history.probe_time_share,
        "boundaries": [_boundary(history, k) for k in range(1, len(history.stages))],
    }


def _boundary(history: RunHistory, k: int) -> Answer:
    former, row = history.stages[k - 1], history.stages[k]
    moved = [move for move in moves(former.weights, row.weights) if move.change]
    return {
        "stage": row.stage,
        "iteration": row.start_iteration,
        "source": row.source,
        "reason": sentence(row.reason),
        "total_variation": row.total_variation,
        "total_variation_noise": row.total_variation_noise,
        "largest_moves": [
            {"domain": move.domain, "before": move.before, "after": move.after}
            for move in moved[:3]
        ],
        "cost": cost_in_words(row),
    }


def in_words(history: RunHistory) -> str:
    """Describe in a few sentences the run's progress, what moved, and the effect."""
    parts = (_model_in_words, _moves_in_words, _losses_in_words, _probe_in_words)
    return " ".join(filter(None, (part(history) for part in parts)))


def _model_in_words(history: RunHistory) -> str:
    layers = history.setting("model", "num_layers")
    hidden = history.setting("model", "hidden_size")
    size = f" of {layers} layers and hidden size {hidden}" if layers and hidden else ""
    planned = history.setting("train", "train_iters")
    of_planned = f" of {planned:,}" if isinstance(planned, int) else ""
    return f"A GPT{size}, trained for {history.iteration:,}{of_planned} iterations."


def _moves_in_words(history: RunHistory) -> str:
    if len(history.stages) < 2:
        return "The mixture has not been reconsidered yet."
    resets = len(history.stages) - 1
    kept = sum(row.source == "kept" for row in history.stages)
    words = f"The mixture was reconsidered at {resets} boundar{'y' if resets == 1 else 'ies'}"
    words += f", and kept at {kept} of them." if kept else "."
    first, last = history.stages[0].weights, history.stages[-1].weights
    largest = [move.in_words() for move in moves(first, last)[:3] if move.change]
    return words + (f" What moved most since the start: {'; '.join(largest)}." if largest else "")


def _losses_in_words(history: RunHistory) -> str:
    means = list(history.mean_task_loss.items())
    if len(means) < 2:
        return ""
    (start, first), (end, last) = means[0], means[-1]
    return (
        f"The mean loss over {len(history.task_losses[end])} tasks went from {number(first)} "
        f"(iteration {start:,}) to {number(last)} (iteration {end:,})."
    )


def _probe_in_words(history: RunHistory) -> str:
    if not history.measured or history.probe_token_share is None:
        return ""
    return (
        f"Measuring influence took {percent(history.probe_token_share)} of all tokens processed "
        f"and {percent(history.probe_time_share)} of the time."
    )


def mixture(history: RunHistory) -> Answer:
    """Return each domain's weights by stage, and its tokens, in the order of the last weight."""
    drawn_D, epochs_D = history.samples_KD.sum(axis=0), history.epochs_KD.sum(axis=0)
    return {
        "stages": [row.stage for row in history.stages],
        "iterations": [row.start_iteration for row in history.stages],
        "domains": [
            {
                "domain": name,
                "weights": history.weights_KD[:, d].tolist(),
                "samples": drawn_D[d],
                "tokens": tokens(history, drawn_D[d]),
                "epochs": known(epochs_D[d]),
            }
            for d, name in enumerate(history.domains)
        ],
    }


def influence(history: RunHistory, stage: int | None = None) -> Answer:
    """Return the matrix that was measured before a stage (None: the last measured one).

    Raises:
        InputError: nothing was measured there; the stages that have a matrix are named.
    """
    row, matrix = measured(history, stage)
    noise_VD = matrix.is_noise()
    return {
        "stage": row.stage,
        "iteration": row.start_iteration,
        "curvature": row.curvature,
        "tasks": [
            {
                "task": task,
                "domains": {
                    domain: {
                        "influence": known(matrix.values_VD[v, d]),
                        "standard_error": known(matrix.errors_VD[v, d]),
                        "within_noise": bool(noise_VD[v, d]),
                    }
                    for d, domain in enumerate(matrix.domains)
                },
            }
            for v, task in enumerate(matrix.tasks)
        ],
    }


def measured(history: RunHistory, stage: int | None) -> tuple[StageRow, Influence]:
    """Return a stage's row and the matrix measured before it.

    Raises:
        InputError: as :func:`influence`.
    """
    found = {row.stage: (row, matrix) for row, matrix in history.measured}
    if not found:
        raise InputError("no boundary of this run has measured influence yet")
    if stage is None:
        return found[max(found)]
    if stage not in found:
        listed = ", ".join(map(str, found))
        raise InputError(f"--stage {stage}: no influence was measured before it; try {listed}")
    return found[stage]


def why(history: RunHistory, domain: str, stage: int | None = None) -> Explanation:
    """Explain the change of `domain` at the boundary before `stage` (None: the last that measured).

    Raises:
        InputError: the domain or stage is unknown, or nothing was solved at the boundary, or it
            came before the domain.
    """
    if domain not in history.domains:
        listed = ", ".join(map(clean, history.domains[:12]))
        raise InputError(f"no domain named {clean(domain)!r}; this run has {listed}")
    row, _ = measured(history, stage)
    explainer = explained(history, row)
    if domain not in row.weights:
        added = next(each.stage for each in history.stages if domain in each.weights)
        raise InputError(
            f"stage {row.stage}: domain {clean(domain)} was added later, with stage {added}; "
            f"ask of a stage that was measured after that"
        )
    return explainer.of(domain)


def explained(history: RunHistory, row: StageRow) -> Explainer:
    """Explain the change of every domain at the boundary before a stage.

    Raises:
        InputError: nothing was solved there, or an earlier version wrote the row.
    """
    former = next(each for each in reversed(history.stages) if each.stage < row.stage)
    return Explainer(former, row)


def compare(first: RunHistory, second: RunHistory) -> Answer:
    """Compare task losses after equally many samples, last mixtures, cost and settings of two runs.

    Differences are second minus first: where a loss has a negative one, the second run is better.
    """
    losses = [_losses_by_samples(history) for history in (first, second)]
    common = sorted(losses[0].keys() & losses[1].keys())
    rows = []
    for samples in common:
        a, b = losses[0][samples], losses[1][samples]
        rows.append(
            {
                "samples": samples,
                "tokens": tokens(first, samples),
                "tasks": {
                    task: {"first": a[task], "second": b[task], "difference": _minus(b, a, task)}
                    for task in a
                    if task in b
                },
            }
        )
    last = [history.stages[-1].weights for history in (first, second)]
    moved = moves(*last)
    weights = [
        {"domain": move.domain, "first": move.before, "second": move.after} for move in moved
    ]
    return {
        "losses": rows,
        "weights": weights,
        "total_variation": sum(abs(move.change) for move in moved) / 2,
        "probe_token_share": [run.probe_token_share for run in (first, second)],
        "settings": _different("", first.config, second.config),
    }


def _losses_by_samples(history: RunHistory) -> dict[int, dict[str, float | None]]:
    """Return the losses of each task by the samples trained on before."""
    samples: dict[int, int] = {row.start_iteration: row.start_sample for row in history.stages}
    samples |= {row["iteration"]: row["consumed_samples"] for row in history.metrics}
    return {samples[at]: losses for at, losses in history.task_losses.items()}


def _minus(a: dict[str, float | None], b: dict[str, float | None], task: str) -> float | None:
    first, second = a[task], b[task]
    return None if first is None or second is None else first - second


def _different(path: str, a: Any, b: Any) -> list[Answer]:
    """Return the settings that differ, by dotted name, except `PLACES`."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in dict.fromkeys([*a, *b]):
            found += _different(f"{path}.{key}".lstrip("."), a.get(key), b.get(key))
        return found
    return [{"setting": path, "first": a, "second": b}] if a != b and path not in PLACES else []


def tokens(history: RunHistory, samples: float) -> float | None:
    """Return the tokens in `samples` samples; None if the sequence length is not known."""
    length = history.sequence_length
    return None if length is None else samples * length


def known(value: float) -> float | None:
    """Return `value`, or None if it is not a finite number."""
    return float(value) if np.isfinite(value) else None
