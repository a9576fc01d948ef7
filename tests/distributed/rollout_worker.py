"""One rank of tests/distributed/test_rollout.py: ``torchrun rollout_worker.py JOB.json``.

Reads ``{"part": ..., "settings": [...], "results": FOLDER}`` and writes what this rank saw to
``FOLDER/RANK.json``.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist

import megatron_tikmix.measure.rollouts as rollout_module
from megatron_tikmix.config import AuditConfig, RemixConfig, TaskConfig
from megatron_tikmix.decision.decide import Boundary, Decision
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.measure.rollouts import Rollouts, RolloutService
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.training.loop import Run
from tests.rollout_runs import (
    THREE,
    candidates,
    failing,
    job,
    losses_of_steps,
    rollouts_of,
    settled,
    state_digests,
    trained,
)


def undisturbed(settings: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """Whether training goes on bit for bit, and what the rollouts measured."""
    expected = losses_of_steps(trained(settings, parallel), 3)
    run = trained(settings, parallel)
    before = settled(run)
    outcomes = rollouts_of(run).measure(candidates(run.domains, *THREE), seed=7, iters=2)
    after = state_digests(run)
    return {
        "changed": [kind for kind in before if before[kind] != after[kind]],
        "losses": [expected, losses_of_steps(run, 3)],
        "outcomes": outcomes.outcomes_NV.tolist(),
        "tokens": [outcomes.trained_tokens, outcomes.evaluated_tokens],
    }


def served(settings: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """A solver on rank 0, in good and in bad days; the state must be the same after each."""
    run = trained(settings, parallel)
    rollouts = rollouts_of(run)
    before = settled(run)
    weights_ND = candidates(run.domains, *THREE)
    seen: dict[str, Any] = {}

    def attempt(name: str, solve: Callable[[Any], Any]) -> None:
        service = RolloutService(rollouts, seed=7, iters=2)
        try:
            answer = service.run(solve)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        seen[name] = {
            "answer": answer.tolist() if isinstance(answer, np.ndarray) else answer,
            "rollouts": service.cost.rollouts,
            "tokens": service.cost.trained_tokens,
            "restored": state_digests(run) == before,
        }

    def one_after_the_other(probe: Any) -> Any:
        return np.concatenate([probe(weights_ND[:1]), probe(weights_ND[1:] / 2**30)])

    def fails_after(error: Exception) -> Callable[[Any], Any]:
        def solve(probe: Any) -> Any:
            probe(weights_ND[:1])
            raise error

        return solve

    def goes_on_without(probe: Any) -> Any:
        try:
            return probe(weights_ND)
        except RolloutError as error:
            return f"went on without: {error}"

    attempt("direct", lambda probe: probe(weights_ND))
    attempt("two probes", one_after_the_other)
    attempt("no probe", lambda probe: "nothing asked")
    attempt("solver fails", fails_after(ArithmeticError("no solution")))
    attempt("bad input", fails_after(InputError("remix.gamma is wrong")))
    attempt("no mixture", lambda probe: probe(np.zeros((1, 3), dtype=np.int64)))
    seen["audit"] = audited(rollouts)
    broken_data(rollouts, parallel.rank == 1)
    attempt("data fails on rank 1", lambda probe: probe(weights_ND))
    attempt("data fails on rank 1, caught", goes_on_without)
    del rollouts._next_batch
    failing(run, 20, ValueError("no more"))
    attempt("a step fails on both", goes_on_without)
    return seen


def audited(rollouts: Rollouts) -> dict[str, Any]:
    """A Remixer's audits of a mixture without the domain of the task that counts, against a
    prediction made by hand; the weight of that domain afterwards."""
    domains, tasks = rollouts.data.domains, rollouts.data.tasks
    old, new = Mixture.uniform(domains).rounded(), Mixture({"low": 1.0, "high": 0.0, "junk": 0.0})
    at = Boundary(stage=1, iteration=0, prior=old, consumed={}, interval_samples=1, ledger=[])
    decided = Decision(new)
    if rollouts.parallel.is_main:
        values_VD = [[float(name == "low") for name in domains] for _ in tasks]
        matrix = InfluenceMatrix(values_VD, domains=domains, tasks=tasks)
        bank: Any = SimpleNamespace(influence_matrix=lambda: matrix)
        decided = Decision(new, source="tikmix_d", reason="so", bank=bank)
    forced = replace(decided, source="fallback") if rollouts.parallel.is_main else decided
    weights, verdict = {}, None
    for name, decision, required in (
        ("required", decided, True),
        ("not required", decided, False),
        ("forced", forced, True),
    ):
        config: Any = SimpleNamespace(
            audit=AuditConfig(enabled=True, iters=8),
            remix=RemixConfig(require_audit=required),
            probe=SimpleNamespace(seed=5),
            deciding_tasks={
                "low": TaskConfig(domain="low", weight=1e-6),
                "high": TaskConfig(domain="high"),
            },
        )
        probe: Any = SimpleNamespace(domains=domains)
        nothing: Any = None
        remixer = Remixer(probe, nothing, rollouts, rollouts.parallel, config, nothing)
        found = remixer._audited(decision, at)
        weights[name] = round(found.mixture["high"], 3)
        verdict = found.audit and found.audit["verdict"]
    return {"verdict": verdict, "weight": weights}


def broken_data(rollouts: Rollouts, broken: bool) -> None:
    real = rollouts._next_batch

    def next_batch(blended: Any) -> Any:
        if broken:
            raise OSError("the disk is gone")
        return real(blended)

    rollouts._next_batch = next_batch


def alone(settings: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """A step fails on rank 1 only, in the middle of the others' step: the job must end."""
    rollout_module._PATIENCE_SECONDS = 1.0
    run: Run = trained(settings, parallel)
    if parallel.rank == 1:
        failing(run, 20, ValueError("only here"))
    weights_ND = candidates(run.domains, *THREE)
    RolloutService(rollouts_of(run), seed=7, iters=2).run(lambda probe: probe(weights_ND))
    return {}


@contextmanager
def joined_once() -> Iterator[None]:
    """The ranks connected for all layouts: they cannot connect twice through one launcher."""
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    try:
        with (
            mock.patch.object(dist, "init_process_group"),
            mock.patch.object(dist, "destroy_process_group"),
        ):
            yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    part = {"undisturbed": undisturbed, "served": served, "alone": alone}[asked["part"]]
    results = []
    with joined_once():
        for settings in asked["settings"]:
            with job(settings) as parallel:
                results.append(part(settings, parallel))
    file = Path(asked["results"]) / f"{os.environ['RANK']}.json"
    file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
