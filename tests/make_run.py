"""A run directory as training would leave it, drawn at random: no model was harmed.

python tests/make_run.py FOLDER DOMAINS [SEED] writes one to look at.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.decision.rules import Rules
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.jsonl import append_jsonl
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Goal
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d

SEQUENCE_LENGTH, BATCH, INTERVAL, LOG_EVERY = 128, 16, 120, 10


def make_run(
    path: Path,
    domains: Sequence[str],
    tasks: Sequence[str],
    stages: int,
    seed: int,
    initial: Sequence[float] | None = None,
    max_epochs: float | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write config.yaml, starts.jsonl, metrics.jsonl and mixture.jsonl; return ledger and metrics.

    `initial` weights are uniform unless given.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(_config(tasks, stages, seed, max_epochs)))
    append_jsonl(path / "starts.jsonl", _start())
    benefit_VD = rng.normal(0.4, 0.6, (len(tasks), len(domains)))
    benefit_VD[:, -1] = 0.0  # the last domain is noise
    epoch_samples_D = rng.integers(200, 6000, len(domains))
    weights_D = np.full(len(domains), 1.0) if initial is None else np.array(initial)
    weights_D = weights_D / weights_D.sum()
    drawn_D = np.zeros(len(domains), dtype=np.int64)
    loss_V = rng.uniform(5.4, 5.6, len(tasks))
    ledger: list[dict[str, Any]] = []
    metrics: list[dict[str, Any]] = []
    for stage in range(stages):
        former_D = weights_D
        scale = 1e-3
        values_VD = scale * (benefit_VD + rng.normal(0, 0.08, benefit_VD.shape))
        errors_VD = scale * rng.uniform(0.05, 0.2, benefit_VD.shape)
        solved: dict[str, Any] = {}
        if stage:
            solved = _solved(tasks, domains, values_VD, errors_VD, weights_D)
            weights_D = np.array([solved["solution"]["mixture"][name] for name in domains])
        drawn = {
            "domain_samples": _named(domains, drawn_D),
            "domain_epochs": _named(domains, drawn_D / epoch_samples_D),
        }
        evaluated = {"task_loss": _named(tasks, loss_V)}
        if stage:
            metrics[-1] |= drawn | evaluated | {"task_bits_per_byte": _named(tasks, loss_V / 3)}
        ledger.append(
            {
                "stage": stage,
                "start_iteration": stage * INTERVAL,
                "start_sample": stage * INTERVAL * BATCH,
                "source": "tikmix_d" if stage else "initial",
                "reason": "the change is 3.1 times its noise" if stage else "the initial mixture",
                "weights": _named(domains, weights_D),
                **(solved or dict.fromkeys(("influence", "influence_se", "rules", "solution"))),
                "curvature": "adam" if stage else None,
                "total_variation": float(np.abs(weights_D - former_D).sum() / 2) if stage else None,
                "total_variation_noise": 0.021 if stage else None,
                "effective_domains": Mixture(_named(domains, weights_D)).effective_domains,
                "probe_tokens": 98304 if stage else 0,
                "probe_seconds": 3.2 if stage else 0.0,
                "rank_stability": _rank_stability(tasks, rng) if stage > 1 else None,
                "rollout": _rollout() if stage else None,
                "audit": _audit(tasks) if stage else None,
                **drawn,
                **evaluated,
            }
        )
        for step in range(LOG_EVERY, INTERVAL + 1, LOG_EVERY):
            drawn_D = drawn_D + rng.multinomial(LOG_EVERY * BATCH, weights_D)
            metrics.append(_step(stage * INTERVAL + step, domains, drawn_D, rng))
        loss_V = loss_V - 2.2 * 0.55**stage * rng.uniform(0.3, 0.6, len(tasks))
    metrics[-1] |= {
        "task_loss": _named(tasks, loss_V),
        "task_bits_per_byte": _named(tasks, loss_V / 3),
        "domain_epochs": _named(domains, drawn_D / epoch_samples_D),
    }
    for row in metrics:
        append_jsonl(path / "metrics.jsonl", row)
    for row in ledger:
        append_jsonl(path / "mixture.jsonl", row)
    return json.loads(json.dumps(ledger)), metrics


def many_domains(count: int) -> tuple[list[str], list[float]]:
    """Names and weights of a corpus of so many domains: few are large, and most are small."""
    kinds = ("web", "code", "books", "papers", "forum", "news", "legal", "wiki")
    names = [f"{kinds[i % len(kinds)]}_{i // len(kinds):03d}" for i in range(count)]
    return names, [1 / (1 + i) for i in range(count)]


def _config(
    tasks: Sequence[str], stages: int, seed: int, max_epochs: float | None
) -> dict[str, Any]:
    return {
        "run_dir": "runs/synthetic",
        "seed": seed,
        "data": {"sequence_length": SEQUENCE_LENGTH, "manifest": "data/domains.yaml"},
        "tasks": {task: {"weight": 1.0} for task in tasks},
        "train": {"train_iters": stages * INTERVAL, "global_batch_size": BATCH},
        "optimizer": {"lr": 1e-3},
        "remix": {
            "policy": "tikmix_d",
            "interval_samples": INTERVAL * BATCH,
            "preset": None,
            "alpha": 0.1,
            "beta": 1.0,
            "gamma": 1.0,
            "gain": "log",
            "diversity_reference": "prior",
            "constraints": {"max_epochs": max_epochs},
        },
        "audit": {"enabled": True},
        "model": {"num_layers": 4, "hidden_size": 128},
    }


def _start() -> dict[str, Any]:
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "iteration": 0,
        "world_size": 2,
        "layout": {"tensor": 1, "pipeline": 1, "data": 2},
        "device": "cpu",
        "versions": {"python": "3.11.2", "megatron_tikmix": "0.1.0", "torch": "2.13.0"},
    }


def _solved(
    tasks: Sequence[str],
    domains: Sequence[str],
    values_VD: np.ndarray,
    errors_VD: np.ndarray,
    prior_D: np.ndarray,
) -> dict[str, Any]:
    """What a boundary solves on, and its answer, as fields of a row."""
    prior = Mixture(_named(domains, prior_D))
    influence = InfluenceMatrix(
        values_VD, domains=domains, tasks=tasks, standard_error_VD=errors_VD
    )
    goal = Goal.of_preset("default", prior, alpha=0.1, task_weights=dict.fromkeys(tasks, 1.0))
    constraints = MixtureConstraints()
    rules = Rules(policy="tikmix_d", goal=goal, constraints=constraints, tasks=tuple(tasks))
    solution = solve_tikmix_d(influence, prior, goal, constraints)
    return {
        **influence.to_json(),
        "rules": rules.to_json(),
        "solution": solution.to_json(),
    }


def row_of(data: Mapping[str, Any]) -> StageRow:
    """A row of the ledger from its JSON, of which a stage and its place may be left out."""
    return StageRow.from_json({"stage": 0, "start_iteration": 0, "start_sample": 0, **data})


def _rank_stability(tasks: Sequence[str], rng: np.random.Generator) -> dict[str, Any]:
    ceiling_V = rng.uniform(0.7, 1.0, len(tasks))
    return {
        "correlation": _named(tasks, 0.9 * ceiling_V),
        "ceiling": _named(tasks, ceiling_V),
    }


def _rollout() -> dict[str, Any]:
    return {"rollouts": 24, "trained_tokens": 50_000, "evaluated_tokens": 9_000, "seconds": 4.0}


def _audit(tasks: Sequence[str]) -> dict[str, Any]:
    found = {"predicted": 0.1, "difference": 0.02, "low": 0.01, "high": 0.03}
    return {
        "overall": {**found, "verdict": "confirmed"},
        "tasks": {task: {**found, "verdict": "confirmed"} for task in tasks},
        "iters": 40,
        "repetitions": 4,
        "confidence": 0.95,
        "lost": [0, 0],
        "trained_tokens": 40_000,
        "evaluated_tokens": 8_000,
        "seconds": 2.0,
    }


def _step(
    iteration: int, domains: Sequence[str], drawn_D: np.ndarray, rng: np.random.Generator
) -> dict[str, Any]:
    loss = 2.4 + 3.2 * float(np.exp(-iteration / 150)) + float(rng.normal(0, 0.03))
    seen = [name for name in domains if rng.random() < 0.8]
    return {
        "iteration": iteration,
        "consumed_samples": iteration * BATCH,
        "lm_loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": float(rng.uniform(0.5, 1.5)),
        "tokens_per_second": float(rng.uniform(8000, 9500)),
        "memory_bytes": 500_000_000 + 1000 * iteration,
        "skipped_iterations": iteration // 50,
        "loss_spikes": iteration // 40,
        "domain_loss": {name: loss + float(rng.normal(0, 0.2)) for name in seen},
        "domain_samples": _named(domains, drawn_D),
    }


def realised(ledger: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> dict[str, float]:
    """What training hands over beside a row of metrics: each domain's share of its stage."""
    begun = [stage for stage in ledger if stage["start_iteration"] < row["iteration"]][-1]
    samples = row["domain_samples"]
    since = {name: count - begun["domain_samples"][name] for name, count in samples.items()}
    return {name: count / sum(since.values()) for name, count in since.items()}


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))


if __name__ == "__main__":
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    names, shares = many_domains(count)
    make_run(
        folder,
        names,
        [f"task_{number}" for number in range(4 if count < 20 else 9)],
        stages=6,
        seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0,
        initial=None if count < 20 else shares,
        max_epochs=4.0,
    )
