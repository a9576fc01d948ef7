"""Influence through the whole path equals plain torch.autograd on the whole model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tikmix.config import ParametersConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.measure.probe import InfluenceProbe
from megatron_tikmix.measure.shards import check_selection
from megatron_tikmix.training.loop import Run
from tests.conftest import overridden
from tests.influence_reference import largest_error, make_ragged, probe_of, reference
from tests.one_rank import one_rank

SAMPLES = {"sub_batch_samples": 4, "task_samples": 12}


def measure(probe: InfluenceProbe, count: int = 8) -> SubBatchBank:
    with probe.open(stage=1):
        return probe.add(np.full(len(probe.domains), count))


def error(run: Run, probe: InfluenceProbe, curvature: str, **options: Any) -> float:
    bank = measure(probe)
    assert probe.curvature == curvature
    expected = reference(run, curvature=curvature, stage=1, **SAMPLES, **options)
    return largest_error(bank.sums_DBV, bank.tokens_DB, expected)


@pytest.fixture
def ragged(trained: Run) -> Run:
    assert trained.remixer is not None
    make_ragged(trained.remixer.probe._data)
    return trained


def test_every_micro_batch_size_gives_what_autograd_gives(ragged: Run) -> None:
    curvature = ragged.config.probe.curvature
    expected = reference(ragged, curvature=curvature, stage=1, **SAMPLES)
    assert len(np.unique(expected[1])) > 4, "sub-batches must differ in tokens"
    for size in range(1, 9):
        bank = measure(probe_of(ragged, micro_batch_size=size))
        assert largest_error(bank.sums_DBV, bank.tokens_DB, expected) < 1e-5, size


@pytest.mark.parametrize("trained", ["identity"], indirect=True)
def test_further_sub_batches_go_on_in_each_domains_stream(ragged: Run) -> None:
    expected = reference(ragged, curvature="identity", stage=1, **SAMPLES)
    probe = probe_of(ragged)
    with probe.open(stage=1):
        first = probe.add(np.array([8, 3, 0]))
        assert first.sub_batches_D.tolist() == [8, 3, 0]
        probe.add(np.array([0, 4, 8]))
        bank = probe.add(np.array([0, 1, 0]))
    assert largest_error(bank.sums_DBV, bank.tokens_DB, expected) < 1e-5
    # What was passed through, padding included: sub-batches of 4 fill two micro-batches of 3.
    assert probe.tokens == 32 * (2 * 12 + 3 * 8 * 6)
    with pytest.raises(RuntimeError, match="inside"):
        probe.add(np.full(3, 8))


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_replicated_gives_the_same(ragged: Run) -> None:
    for group in (None, 1):
        probe = probe_of(ragged, data_parallel_mode="replicated", task_group_size=group)
        assert error(ragged, probe, "adam") < 1e-5


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_bf16_validation_gradients_cost_a_rounding(ragged: Run) -> None:
    found = error(ragged, probe_of(ragged, gradient_dtype="bf16"), "adam")
    assert 1e-6 < found < 2e-2


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_parameter_filters(ragged: Run) -> None:
    parameters = ParametersConfig(include=["decoder.*"], exclude=["*.bias", "*.layers.3.*"])
    assert sum(map(parameters.selects, ["decoder.final_layernorm.weight", "embedding.x"])) == 1
    probe = probe_of(ragged, parameters=parameters)
    assert error(ragged, probe, "adam", selects=parameters.selects) < 1e-5


@pytest.mark.parametrize("trained", ["identity"], indirect=True)
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"include": ["decoder.layer.*"]}, "include: decoder.layer.* matches no parameter; names"),
        ({"exclude": ["*.bias", "lm_head.*"]}, r"exclude: lm_head.* matches no"),
        ({"exclude": ["*"]}, "every included parameter is excluded"),
    ],
)
def test_filters_that_match_nothing_are_refused(
    trained: Run, parameters: dict[str, list[str]], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_selection(
            trained.forward_backward.model, ParametersConfig(**parameters), trained.parallel
        )
    assert words in str(caught.value)


@pytest.mark.parametrize("trained", ["identity"], indirect=True)
def test_squared_gradients_are_the_probes_own(ragged: Run) -> None:
    probe = probe_of(ragged, curvature="squared_gradients")
    assert error(ragged, probe, "squared_gradients") < 1e-5


def test_adam_without_a_second_moment_is_squared_gradients_and_says_so(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Before the first step, as with imported weights; an untied model, by the way."""
    untied = overridden(settings, {"model.share_embeddings_and_output_weights": False})
    with one_rank(untied, tmp_path) as run:
        assert run.remixer is not None
        assert run.config.probe.curvature == "adam"
        assert error(run, run.remixer.probe, "squared_gradients") < 1e-5
