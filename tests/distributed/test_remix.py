"""Boundaries that do more than solve once: rollouts, audit, adaptive budget, phases; two ranks."""

from typing import Any

import pytest

from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import train

ALL_AT_ONCE = {
    "remix.policy": "tikmix_m",
    "remix.measure": "rollout",
    "remix.candidates": 16,
    "remix.influence": "joint",
    "remix.smoothing": 0.3,
    "remix.stop": 8,
    "remix.constraints": {
        "max_epochs": 50.0,
        "pareto": True,
        "confidence": 0.6,
        "pareto_slack": 0.2,
    },
    "remix.require_audit": True,
    "rollout": {"iters": 1},
    "audit": {"enabled": True, "iters": 1},
    "probe.precision": 0.1,
    "probe.max_tokens": 50_000,
    "train.train_iters": 16,
}


@pytest.fixture
def rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    settings = overridden(settings, ALL_AT_ONCE)
    train(settings, ranks=2)
    return read_rows(settings["run_dir"], "mixture.jsonl")


def test_every_part_of_a_boundary_on_two_ranks(rows: list[dict[str, Any]]) -> None:
    initial, first, second, outside = rows
    assert initial["bank"] is None
    for row in (first, second):
        assert row["source"] in ("tikmix_m", "tikmix_d", "kept")
        bank = SubBatchBank.from_json(row["bank"])
        assert bank.sub_batches_D.min() >= 8
        assert row["probe_tokens"] <= 50_000
        assert row["rollout"]["rollouts"] >= 16
        assert row["rollout"]["trained_tokens"] == row["rollout"]["rollouts"] * 8 * 32
        influence = InfluenceMatrix.from_json(row)
        assert influence.degrees_of_freedom >= 7
        assert row["solution"]["details"], "what TiKMiX-M has to tell"
        changed = Mixture(row["weights"]) != Mixture(initial["weights"])
        assert (row["audit"] is not None) or not changed
    assert SubBatchBank.from_json(first["bank"]).sub_batches_D.max() > 8, "noise, so it grew"
    assert first["rank_stability"] is None
    assert set(second["rank_stability"]["correlation"]) == {"low", "high"}
    assert (outside["source"], outside["probe_tokens"]) == ("kept", 0)
    assert outside["reason"] == "resets ended at iteration 8 (remix.stop)"


def test_without_anything_applied_training_is_that_of_a_static_run(
    settings: dict[str, Any],
) -> None:
    """Probe and rollouts, and so audits, leave no trace in the losses, bit for bit."""
    runs = {}
    for name, overrides in {
        "measured": {
            **ALL_AT_ONCE,
            "remix.mode": "advise",
            "audit.enabled": False,
            "remix.require_audit": False,
        },
        "static": {"remix.policy": "static", "train.train_iters": 16},
    }.items():
        mine = overridden(settings, {**overrides, "run_dir": f"{settings['run_dir']}-{name}"})
        train(mine, ranks=2)
        runs[name] = without_timings(read_rows(mine["run_dir"], "metrics.jsonl"))
    assert runs["measured"] == runs["static"]
