"""Seconds of a boundary: what follows from whom, and the advice that the plan gives."""

import typing
from pathlib import Path
from typing import Any

import pytest

from megatron_tikmix.config import RunConfig, load_config
from megatron_tikmix.errors import InputError
from megatron_tikmix.measure.boundary_cost import ACCELERATORS, BoundaryCost, boundary_cost
from megatron_tikmix.measure.probe_plan import ProbeSizes, Trained, plan_probe_of

SEVEN_B = str(Path(__file__).parents[3] / "examples" / "7b.yaml")
VOCAB_SIZE, DOMAINS = 32000, 26


def configured(**changes: Any) -> RunConfig:
    options = [f"--{name}={value}" for name, value in changes.items()]
    config, _ = load_config([SEVEN_B, *(o.replace("__", ".") for o in options)])
    return config


def cost(world_size: int, device_name: str = "h100", **changes: Any) -> BoundaryCost:
    config = configured(**changes)
    config.check(world_size)
    trained = Trained.of(config, world_size, VOCAB_SIZE)
    samples = [config.probe.task_samples] * len(config.tasks)
    sizes = ProbeSizes(domains=DOMAINS, tasks=len(config.tasks), samples=samples)
    plan = plan_probe_of(trained, config, sizes)
    assert plan is not None
    return boundary_cost(device_name, config, world_size, trained, plan)


def test_seconds_of_micro_batches_are_those_of_all_flops() -> None:
    """364 sub-batches of 64 samples and 9 tasks of 64, of 4,096 tokens, on 64 cards at 40 %."""
    found = cost(64)
    config = configured()
    flops = Trained.of(config, 64, VOCAB_SIZE).flops_per_token
    tokens = (26 * 14 + 9) * 64 * 4096
    compute = found.seconds("compute")
    assert found.sub_batches == 26 * 14
    assert compute == pytest.approx(tokens * flops / (0.4 * 989e12 * 64))


def test_a_gradient_is_reduced_once_a_sub_batch_over_the_network() -> None:
    found = cost(64)
    parameters = Trained.of(configured(), 64, VOCAB_SIZE).parameters
    assert found.sub_batch.reduced_bytes == 4 * parameters
    assert found.sub_batch.reduction == pytest.approx(4 * parameters * 31 / 32 / (0.8 * 50e9))
    # Within a node it goes over its own links, nine times as fast.
    near, far = cost(8), cost(16)
    ratio = (far.sub_batch.reduction * 8 / 7) / (near.sub_batch.reduction * 4 / 3)
    assert ratio == pytest.approx(9)


def test_replicated_reduces_none_and_deals_sub_batches_out() -> None:
    found = cost(64, probe__data_parallel_mode="replicated")
    assert found.sub_batch.reduction == 0
    assert found.sub_batches == -(-26 * 14 // 32)
    assert found.row.reduction > 0
    in_groups = cost(64, probe__data_parallel_mode="replicated", probe__task_group_size=1)
    assert in_groups.sub_batches == 9 * found.sub_batches  # all of them again for each task
    assert "or probe.data_parallel_mode replicated" not in in_groups.in_words()


def test_curvature_passes_a_sub_batch_of_each_domain() -> None:
    found = cost(64, probe__curvature="squared_gradients", probe__sub_batch_samples=128)
    assert found.curvature_passes == 26
    assert found.curvature.micro_batches == found.sub_batch.micro_batches == 2 * 1
    assert found.curvature.reduction == found.sub_batch.reduction


def test_recomputed_layers_pass_forward_twice() -> None:
    plain = cost(64)
    recomputed = cost(
        64,
        model__recompute_granularity="full",
        model__recompute_method="uniform",
        model__recompute_num_layers=1,
    )
    assert recomputed.sub_batch.compute == pytest.approx(4 / 3 * plain.sub_batch.compute)


def test_interleaved_stages_fill_the_pipeline_in_less_time() -> None:
    stages = {"model__pipeline_model_parallel_size": 4}
    plain = cost(512, **stages)
    interleaved = cost(512, **stages, model__virtual_pipeline_model_parallel_size=4)
    assert plain.sub_batch.fill == pytest.approx(3 * plain.sub_batch.compute)  # 1 micro-batch
    assert interleaved.sub_batch.fill == pytest.approx(plain.sub_batch.fill / 4)
    assert interleaved.sub_batch.micro_batches == 4  # a multiple of the stages


@pytest.mark.parametrize("device_name", ACCELERATORS)
@pytest.mark.parametrize("stages", [1, 4])
def test_the_advice_helps_and_no_smaller_sub_batch_would(device_name: str, stages: int) -> None:
    layout = {"model__pipeline_model_parallel_size": stages}
    found = cost(512, device_name, **layout)
    assert found.sub_batch.lost > 0.25
    assert f"make probe.sub_batch_samples {found.enough_samples:,}" in found.in_words()
    advised = cost(512, device_name, **layout, probe__sub_batch_samples=found.enough_samples)
    assert advised.sub_batch.lost <= 0.25
    assert "probe.sub_batch_samples" not in advised.in_words()
    micro_batches = advised.sub_batch.micro_batches
    fewer = found.enough_samples * (micro_batches - 1) // micro_batches
    assert cost(512, device_name, **layout, probe__sub_batch_samples=fewer).sub_batch.lost > 0.25


def test_parts_add_up() -> None:
    found = cost(512, model__pipeline_model_parallel_size=4)
    parts = ("compute", "fill", "reduction", "products")
    sums = {part: found.seconds(part) for part in parts}
    assert sums["fill"] == pytest.approx(
        found.sub_batches * found.sub_batch.fill + 9 * found.row.fill
    )
    assert found.total == pytest.approx(sum(sums.values()) + found.solve)
    for seconds in sums.values():
        assert f"{seconds:.3g}" in found.in_words()


def test_the_configuration_names_the_cards_that_have_figures() -> None:
    names = typing.get_args(typing.get_type_hints(RunConfig)["device_name"])[0]
    assert set(typing.get_args(names)) == set(ACCELERATORS)


def test_a_card_without_figures_is_refused() -> None:
    with pytest.raises(InputError, match="device_name v100 is not known; use one of a100, h100"):
        cost(64, "v100")
