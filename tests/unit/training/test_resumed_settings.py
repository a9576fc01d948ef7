"""What a resumed run takes from its configuration, and what depends on the device."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tikmix.training import checkpoint
from megatron_tikmix.training.checkpoint import Checkpointer
from megatron_tikmix.training.loop import train_interval
from tests.conftest import overridden
from tests.one_rank import one_rank


def test_learning_rate_and_adam_follow_the_configuration(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = overridden(settings, {"scheduler.lr_decay_style": "constant"})
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=2)
        assert run.checkpointer.save(run.state, wait=True)
    changed = {
        "optimizer.lr": 3e-4,
        "optimizer.adam_beta1": 0.7,
        "optimizer.adam_beta2": 0.1,
        "optimizer.adam_eps": 1e-7,
        "optimizer.weight_decay": 0.2,
    }
    with one_rank(overridden(settings, changed), tmp_path) as run:
        assert run.state.iteration == 2
        train_interval(run, until=3)
        for group in run.optimizer.param_groups:
            assert group["lr"] == pytest.approx(3e-4)
            assert tuple(group["betas"]) == (0.7, 0.1)
            assert group["eps"] == 1e-7
        assert max(group["weight_decay"] for group in run.optimizer.param_groups) == 0.2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_random_streams_are_those_of_one_kind_of_device(
    device: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint from a GPU has states that a CPU cannot take."""
    taken = []
    monkeypatch.setattr(checkpoint, "set_rng_state", taken.append)
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=1)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpointer, "_layout", lambda self: [1, 1, 1, 1, device])
            assert run.checkpointer.save(run.state, wait=True)
    with one_rank(settings, tmp_path) as run:
        assert run.state.iteration == 1
    assert len(taken) == (device == "cpu")
