"""A run directory as training would leave it, drawn at random: no model was harmed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_tikmix.monitoring.run_files import append_jsonl

SEQUENCE_LENGTH, BATCH, INTERVAL, LOG_EVERY = 128, 16, 120, 10


def make_run(
    path: Path, domains: Sequence[str], tasks: Sequence[str], stages: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write config.yaml, metrics.jsonl and mixture.jsonl; return the ledger and the metrics."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "data": {"sequence_length": SEQUENCE_LENGTH},
        "train": {"train_iters": stages * INTERVAL, "global_batch_size": BATCH},
        "remix": {"interval": INTERVAL},
        "model": {"num_layers": 4, "hidden_size": 128},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    benefit_VD = rng.normal(0.4, 0.6, (len(tasks), len(domains)))
    benefit_VD[:, -1] = 0.0  # the last domain is noise
    epoch_samples_D = rng.integers(200, 6000, len(domains))
    weights_D = np.full(len(domains), 1 / len(domains))
    drawn_D = np.zeros(len(domains))
    loss_V = rng.uniform(5.4, 5.6, len(tasks))
    ledger: list[dict[str, Any]] = []
    for stage in range(stages):
        former_D = weights_D
        if stage:
            push_D = 0.6 * benefit_VD.mean(axis=0) + rng.normal(0, 0.1, len(domains))
            weights_D = weights_D * np.exp(push_D)
            weights_D /= weights_D.sum()
        scale = 1e-3
        values_VD = scale * (benefit_VD + rng.normal(0, 0.08, benefit_VD.shape))
        errors_VD = scale * rng.uniform(0.05, 0.2, benefit_VD.shape)
        ledger.append(
            {
                "stage": stage,
                "start_iteration": stage * INTERVAL,
                "start_sample": stage * INTERVAL * BATCH,
                "source": "tikmix_d" if stage else "initial",
                "reason": "the change is 3.1 times its noise" if stage else "uniform weights",
                "weights": _named(domains, weights_D),
                "influence": _table(tasks, domains, values_VD) if stage else None,
                "influence_se": _table(tasks, domains, errors_VD) if stage else None,
                "task_loss": _named(tasks, loss_V),
                "domain_samples": _named(domains, drawn_D),
                "domain_epochs": _named(domains, drawn_D / epoch_samples_D),
                "curvature": "adam" if stage else None,
                "total_variation": float(np.abs(weights_D - former_D).sum() / 2) if stage else None,
                "total_variation_noise": 0.021 if stage else None,
                "effective_domains": float(np.exp(-(weights_D * np.log(weights_D)).sum())),
                "probe_tokens": 98304 if stage else 0,
                "probe_seconds": 3.2 if stage else 0.0,
                "solution": _solution(tasks) if stage else None,
                "rank_stability": _rank_stability(tasks, rng) if stage > 1 else None,
                "rollout": None,
                "audit": _audit() if stage else None,
            }
        )
        drawn_D = drawn_D + rng.multinomial(INTERVAL * BATCH, weights_D)
        loss_V = loss_V - 2.2 * 0.55**stage * rng.uniform(0.3, 0.6, len(tasks))
    metrics = [_step(i, domains, rng) for i in range(LOG_EVERY, stages * INTERVAL + 1, LOG_EVERY)]
    for row in metrics:
        if row["iteration"] % INTERVAL == 0:
            next_stage = row["iteration"] // INTERVAL
            row["task_loss"] = (
                ledger[next_stage]["task_loss"] if next_stage < stages else _named(tasks, loss_V)
            )
        append_jsonl(path / "metrics.jsonl", row)
    for row in ledger:
        append_jsonl(path / "mixture.jsonl", row)
    return json.loads(json.dumps(ledger)), metrics


def _solution(tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "gain_before": dict.fromkeys(tasks, 0.25),
        "gain_after": {task: 0.5 + number / 8 for number, task in enumerate(tasks)},
        "objective": -3.1,
        "status": "solved",
        "certificate": {"lower_bound": -3.1, "gap": 2e-14, "violation": 0.0},
    }


def _rank_stability(tasks: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    ceiling_V = rng.uniform(0.7, 1.0, len(tasks))
    return {
        "correlation": _named(tasks, 0.9 * ceiling_V),
        "ceiling": _named(tasks, ceiling_V),
    }


def _audit() -> dict[str, Any]:
    return {
        "verdict": "confirmed",
        "reason": "the audit's rollouts are as predicted",
        "overall": {"predicted": 0.1, "difference": 0.02, "low": 0.01, "high": 0.03},
        "trained_tokens": 40_000,
        "evaluated_tokens": 8_000,
        "seconds": 2.0,
    }


def _step(iteration: int, domains: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    loss = 2.4 + 3.2 * float(np.exp(-iteration / 150)) + float(rng.normal(0, 0.03))
    seen = [name for name in domains if rng.random() < 0.8]
    return {
        "iteration": iteration,
        "consumed_samples": iteration * BATCH,
        "lm_loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": float(rng.uniform(0.5, 1.5)),
        "tokens_per_second": float(rng.uniform(8000, 9500)),
        "domain_loss": {name: loss + float(rng.normal(0, 0.2)) for name in seen},
    }


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def _table(
    tasks: Sequence[str], domains: Sequence[str], values_VD: np.ndarray
) -> dict[str, dict[str, float]]:
    return {task: _named(domains, row_D) for task, row_D in zip(tasks, values_VD, strict=True)}
