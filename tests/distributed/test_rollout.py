"""Rollouts on two ranks: exact restoration, the numbers of one rank, and no hang."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

import megatron_tikmix.measure.rollouts as rollouts_module
from megatron_tikmix.config import AuditConfig, RemixConfig, TaskConfig
from megatron_tikmix.decision.decide import Boundary, Decision
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.measure.rollouts import Rollouts, RolloutService
from megatron_tikmix.mixture.mixture import Mixture
from tests.conftest import overridden
from tests.ranks import RanksFailed, run_on_ranks
from tests.rollout_runs import (
    DROPOUT,
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

LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "data parallel, bf16, dropout": {**DROPOUT, "model.bf16": True},
    "data parallel, overlapped, dropout": {
        **DROPOUT,
        "ddp.overlap_grad_reduce": True,
        "ddp.overlap_param_gather": True,
    },
    "tensor parallel, bf16, dropout": {
        **DROPOUT,
        "model.bf16": True,
        "model.tensor_model_parallel_size": 2,
    },
    "pipeline parallel, dropout": {**DROPOUT, "model.pipeline_model_parallel_size": 2},
    "interleaved pipeline parallel": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    },
}


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    return overridden(settings, {"probe.task_samples": 6})


def undisturbed(settings: dict[str, Any]) -> dict[str, Any]:
    """Whether training goes on bit for bit, and what the rollouts measured."""
    with job(settings) as parallel:
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


def served(settings: dict[str, Any]) -> dict[str, Any]:
    """A solver on rank 0, in good and in bad days; the state must be the same after each."""
    with job(settings) as parallel:
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
        measured: Any = SimpleNamespace(bank=bank)
        decided = Decision(new, source="tikmix_d", reason="so", measured=measured)
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
        verdict = found.audit and found.audit.verdict
    return {"verdict": verdict, "weight": weights}


def broken_data(rollouts: Rollouts, broken: bool) -> None:
    real = rollouts._next_batch

    def next_batch(blended: Any) -> Any:
        if broken:
            raise OSError("the disk is gone")
        return real(blended)

    rollouts._next_batch = next_batch


def alone(settings: dict[str, Any]) -> None:
    """A step fails on rank 1 only, in the middle of the others' step: the job must end."""
    with mock.patch.object(rollouts_module, "_PATIENCE_SECONDS", 1.0), job(settings) as parallel:
        run = trained(settings, parallel)
        if parallel.rank == 1:
            failing(run, 20, ValueError("only here"))
        weights_ND = candidates(run.domains, *THREE)
        RolloutService(rollouts_of(run), seed=7, iters=2).run(lambda probe: probe(weights_ND))


def test_every_layout_is_restored_and_gives_the_numbers_of_one_rank(
    small: dict[str, Any],
) -> None:
    layouts = {
        name: run_on_ranks(undisturbed, 2, overridden(small, overrides))
        for name, overrides in LAYOUTS.items()
    }
    with job(small) as parallel:
        run = trained(small, parallel)
        one = rollouts_of(run).measure(candidates(run.domains, *THREE), seed=7, iters=2)
    # 3 candidates, 2 steps of 8 samples; 2 tasks of 6 samples, before and three times after.
    assert (one.trained_tokens, one.evaluated_tokens) == (3 * 2 * 8 * 32, 4 * 2 * 6 * 32)
    assert np.abs(one.outcomes_NV).min() > 1e-3
    for name, ranks in layouts.items():
        for seen in ranks:
            assert seen["changed"] == [], name
            expected, losses = seen["losses"]
            assert losses == expected, name
            assert seen["tokens"][0] == one.trained_tokens, name
            if "dropout" not in name:
                np.testing.assert_allclose(
                    seen["outcomes"], one.outcomes_NV, rtol=0, atol=5e-6, err_msg=name
                )
        first, second = ranks
        assert first["outcomes"] == second["outcomes"], name


def test_a_solver_on_rank_0_is_served_whatever_happens(small: dict[str, Any]) -> None:
    main, other = run_on_ranks(served, 2, overridden(small, DROPOUT))
    assert main["two probes"]["answer"] == main["direct"]["answer"]
    assert main["no probe"]["answer"] == "nothing asked"
    for name in ("direct", "two probes", "no probe"):
        assert other[name]["answer"] is None
    lost = "the data of a rollout cannot be read: rank 1: OSError: the disk is gone"
    expected = {
        "solver fails": (
            "ArithmeticError: no solution",
            "TrainingError: rank 0: ArithmeticError: no solution",
        ),
        "bad input": ("InputError: remix.gamma is wrong", "InputError: remix.gamma is wrong"),
        "no mixture": ("InputError: rollouts: integer weights", "InputError: rollouts: integer"),
        "data fails on rank 1": (
            f"RolloutError: {lost}",
            f"TrainingError: rank 0: RolloutError: {lost}",
        ),
        "data fails on rank 1, caught": (f"went on without: {lost}", None),
        "a step fails on both": ("went on without: a rollout failed: ValueError: no more", None),
    }
    for name, (on_main, on_other) in expected.items():
        assert main[name]["answer"].startswith(on_main), name
        if on_other is None:
            assert other[name]["answer"] is None, name
        else:
            assert other[name]["answer"].startswith(on_other), name
    audits = main.pop("audit"), other.pop("audit")
    assert [found["verdict"] for found in audits] == ["contradicted", None]
    followed = {"required": 0.333, "not required": 0.0, "forced": 0.0}
    assert [found["weight"] for found in audits] == [followed] * 2
    for name in main:
        assert main[name]["restored"], name
        assert other[name]["restored"], name
        for count in ("rollouts", "tokens"):
            assert main[name][count] == other[name][count], name
    assert main["two probes"]["rollouts"] == 3


def test_a_step_that_fails_on_one_rank_ends_the_job(small: dict[str, Any]) -> None:
    """No time is asserted but the limit: what matters is that nobody waits for ever."""
    with pytest.raises(RanksFailed) as raised:
        run_on_ranks(alone, 2, small, timeout=150)
    _, told = str(raised.value).split("rank 1: Traceback")
    assert "ValueError: only here" in told
