"""The plan's figures against what a probe really passes, keeps and computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from megatron_tikmix.config import RunConfig, load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.errors import InputError
from megatron_tikmix.measure.flops import flops_per_token, parameters_per_rank
from megatron_tikmix.measure.probe_plan import ProbePlan, plan_probe
from megatron_tikmix.training.loop import Run, boundary
from megatron_tikmix.training.plan import describe, matrix_product_rate
from tests.conftest import overridden
from tests.influence_reference import probe_of
from tests.one_rank import one_rank


def configured(settings: dict[str, Any], folder: Path, **fields: Any) -> RunConfig:
    path = folder / "plan.yaml"
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    path.write_text(yaml.safe_dump(overridden(settings, changes)))
    return load_config([str(path)])[0]


def planned(settings: dict[str, Any], folder: Path, ranks: int = 1, **fields: Any) -> ProbePlan:
    config = configured(settings, folder, **fields)
    plan = plan_probe(config, ranks, TrainingData(config))
    assert plan is not None
    return plan


MODES: list[dict[str, Any]] = [
    {},
    {"curvature": "squared_gradients"},
    {"data_parallel_mode": "replicated", "gradient_dtype": "bf16"},
    {"data_parallel_mode": "replicated", "task_group_size": 1},
]


def test_tokens_and_memory_are_those_of_the_probe(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = overridden(settings, {"train.micro_batch_size": 3, "train.global_batch_size": 6})
    settings = overridden(settings, {"remix.interval_samples": 24})
    with one_rank(settings, tmp_path) as run:
        for fields in MODES:
            plan = planned(
                settings, tmp_path, **{f"probe__{key}": value for key, value in fields.items()}
            )
            probe = probe_of(run, **{"curvature": "identity", **fields})
            with probe.open(1):
                assert probe._kept is not None
                rows_VP = probe._kept._tasks_VP
                kept = rows_VP.numel() * rows_VP.element_size()
                if fields.get("task_group_size"):
                    kept = kept * 3 // 2  # and one of the two tasks whole
                probe.add(np.full(3, plan.sub_batches))
            assert probe.tokens == plan.tokens, fields
            assert plan.gradient_bytes == pytest.approx(kept, rel=0.05), fields


def test_several_ranks(settings: dict[str, Any], tmp_path: Path) -> None:
    """By hand: 3 domains × 8 sub-batches of 4 samples, 2 tasks of 12 samples, 32 tokens each."""
    batch = {"train__micro_batch_size": 3, "train__global_batch_size": 12}
    sharded = planned(settings, tmp_path, 2, **batch, remix__interval_samples=24)
    assert sharded.tokens == 32 * (2 * 12 + 24 * 6)  # 4 samples fill two ranks' micro-batches of 3
    assert sharded.least_tokens == sharded.tokens
    replicated = planned(
        settings,
        tmp_path,
        4,
        **batch,
        remix__interval_samples=24,
        probe__data_parallel_mode="replicated",
    )
    assert replicated.tokens == 32 * (2 * 12 + 24 * 6)  # two micro-batches of 3 on one rank
    assert replicated.least_tokens == 32 * (2 * 12 + 24 * 3)
    assert replicated.gradient_bytes == pytest.approx(2 * sharded.gradient_bytes, rel=1e-6)


def test_flops_are_those_that_torch_counts(settings: dict[str, Any], tmp_path: Path) -> None:
    """torch counts the whole square of attention scores, half of which causality masks."""
    gated = {"model.gated_linear_unit": True, "model.num_query_groups": 2}
    with one_rank(overridden(settings, gated), tmp_path) as run:
        assert run.remixer is not None
        (batches,) = run.remixer.probe._data.of_domain(0, 1, [0])
        with FlopCounterMode(display=False) as counter:
            run.forward_backward(batches[:1], 1)
        tokens, model = batches[0]["tokens"].numel(), run.config.model
        square = 3 * 4 * model.num_layers * model.hidden_size * 32 / 2
        assert counter.get_total_flops() == tokens * (flops_per_token(model, 250, 32) + square)
        actual = sum(p.numel() for p in run.forward_backward.model[0].parameters())
        assert parameters_per_rank(model, 250, 32) == pytest.approx(actual, rel=0.05)


def test_sub_batches_are_lowered_aloud(settings: dict[str, Any], tmp_path: Path) -> None:
    wanted = {"probe__sub_batches": 20, "remix__interval_samples": 240}
    plan = planned(settings, tmp_path, **wanted, probe__max_overhead=0.7)
    # 24 samples of tasks and 12 for each sub-batch of the three domains; 168 are allowed.
    assert (plan.sub_batches, plan.sub_batches_asked) == (12, 20)
    config = configured(settings, tmp_path, **wanted, probe__max_overhead=0.7)
    assert "12 sub-batches (lowered from 20 to stay within probe.max_overhead 0.7)" in describe(
        config, 1, TrainingData(config)
    )


def test_what_cannot_fit_is_refused_with_the_remedy(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        planned(settings, tmp_path, probe__max_overhead=0.5)
    message = str(caught.value)
    assert message.startswith("probe.max_overhead: a probe of 3,840 tokens (with 8 sub-batches")
    assert "is 3.75 of an interval's 1,024 tokens, and 0.5 is allowed" in message
    assert "raise remix.interval_samples from 32 to 240" in message
    assert planned(settings, tmp_path, probe__max_overhead=0.5, remix__interval_samples=240)


def test_no_probe_no_plan(settings: dict[str, Any], tmp_path: Path) -> None:
    config = configured(settings, tmp_path, remix__policy="static", probe__max_overhead=0.01)
    assert plan_probe(config, 1, TrainingData(config)) is None


def test_the_run_measures_as_many_sub_batches_as_planned(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = overridden(
        settings,
        {
            "probe.sub_batches": 20,
            "probe.max_overhead": 0.7,
            "remix.interval_samples": 240,
            "probe.curvature": "identity",
        },
    )
    with one_rank(settings, tmp_path) as run:
        assert isinstance(run, Run)
        assert run.remixer is not None
        assert run.probe_plan is not None
        decision = run.remixer.remix(boundary(run))
        assert decision.measured is not None
        assert decision.measured.bank.sub_batches_D.tolist() == [12, 12, 12]
        assert decision.probe_tokens == run.probe_plan.tokens


def test_the_rate_of_a_matrix_product_is_that_of_a_machine() -> None:
    """Between an abacus and a supercomputer: it is an estimate, and no speed is asserted."""
    assert 1e6 < matrix_product_rate(torch.float32, size=64, repeats=2) < 1e18
