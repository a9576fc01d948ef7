"""The probe computes as in training, without chance: same bits as in evaluation mode, no random
number drawn, and no more memory than a step takes."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tikmix.measure import probe as probe_module
from megatron_tikmix.megatron.rng import rng_state, same_rng_state
from megatron_tikmix.megatron.step import evaluation_mode
from megatron_tikmix.training.loop import Run, train_interval
from tests.conftest import overridden
from tests.influence_reference import probe_of
from tests.live_bytes import LiveBytes
from tests.one_rank import one_rank

RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"model.recompute_granularity": "selective"},
    "full": {
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    },
}
DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}


def measured(run: Run) -> np.ndarray:
    with probe_of(run).open(1) as probe:
        return probe.add(np.full(3, 8)).sums_DBV


@pytest.mark.parametrize("recomputation", RECOMPUTATION)
def test_same_bits_as_in_evaluation_mode_and_no_random_number(
    recomputation: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = overridden(settings, RECOMPUTATION[recomputation] | DROPOUT)
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=4)
        modules = [m for chunk in run.forward_backward.model for m in chunk.modules()]
        before, places = rng_state(), [dict(vars(module)) for module in modules]
        with caplog.at_level(logging.WARNING):
            as_in_training = measured(run)
        assert "draws random numbers" not in caplog.text
        assert same_rng_state(before, rng_state())
        for module, former in zip(modules, places, strict=True):
            now = vars(module)
            assert now.get("p") == former.get("p")
            assert now.get("hidden_dropout") == former.get("hidden_dropout")
            assert module.training
        monkeypatch.setattr(probe_module, "without_chance", evaluation_mode)
        np.testing.assert_array_equal(as_in_training, measured(run))
        # The mode of training with chance on is something else: the test could tell.
        monkeypatch.setattr(probe_module, "without_chance", as_it_is)
        assert not np.array_equal(as_in_training, measured(run))


def as_it_is(model: Any) -> AbstractContextManager[None]:
    return torch.enable_grad()


def test_a_module_that_draws_all_the_same_is_told_and_changes_nothing(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with one_rank(settings, tmp_path) as run:
        module = run.forward_backward.model[0].module.decoder.layers[0].mlp
        module.register_forward_hook(lambda *_: torch.rand(1) and None)
        before = rng_state()
        with caplog.at_level(logging.WARNING):
            measured(run)
        assert "draws random numbers" in caplog.text
        assert same_rng_state(before, rng_state())


@pytest.mark.parametrize("recomputation", RECOMPUTATION)
def test_a_probe_needs_no_more_memory_than_a_step_and_what_it_keeps(
    recomputation: str,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    larger = {
        "model.num_layers": 6,
        "model.hidden_size": 64,
        "model.ffn_hidden_size": 256,
        "data.sequence_length": 128,
        "train.micro_batch_size": 4,
        "probe.sub_batch_samples": 4,
    }
    settings = overridden(settings, RECOMPUTATION[recomputation] | larger)
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=3)
        with LiveBytes() as step:
            train_interval(run, until=4)
        probe = probe_of(run)
        kept = len(probe.tasks) * probe._shards.numel * 4
        with LiveBytes() as probing, probe.open(1):
            probe.add(np.full(3, 8))
        # In evaluation mode nothing is recomputed: the test could tell.
        monkeypatch.setattr(probe_module, "without_chance", evaluation_mode)
        with LiveBytes() as evaluating, probe.open(1):
            probe.add(np.full(3, 8))
    most = 1.02 * step.peak + kept
    assert probing.peak <= most
    assert (evaluating.peak > most) == (recomputation != "none")
