"""A checkpoint written in the background holds the state of the moment at which it began."""

from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_tikmix.training.loop import Run, train_interval
from tests.conftest import overridden
from tests.one_rank import one_rank


def parameters(run: Run) -> list[torch.Tensor]:
    model = run.forward_backward.model
    return [value.detach().clone() for chunk in model for value in chunk.parameters()]


def test_training_goes_on_while_a_checkpoint_is_written(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = overridden(settings, {"checkpoint.async_save": True})
    pointer = Path(settings["run_dir"]) / "checkpoints" / "latest_checkpointed_iteration.txt"
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=1)
        assert run.checkpointer.save(run.state)
        saved = parameters(run)
        assert not pointer.exists(), "nothing was waited for"
        train_interval(run, until=3)
        assert run.checkpointer.finish()
        assert pointer.read_text() == "1\n"
        assert not all(map(torch.equal, saved, parameters(run)))
    with one_rank(settings, tmp_path) as run:
        assert run.state.iteration == 1
        assert run.state.consumed_samples == 8
        assert all(map(torch.equal, saved, parameters(run)))
        train_interval(run, until=2)
        assert run.checkpointer.save(run.state, wait=True)
        assert pointer.read_text() == "2\n"


def test_a_save_that_is_waited_for_leaves_no_process_behind(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """megatron-core's would leave one for good when its rank is killed."""
    before = set(psutil.Process().children(recursive=True))
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=1)
        assert run.checkpointer.save(run.state)
        after = set(psutil.Process().children(recursive=True)) - before
    assert not [
        child.cmdline() for child in after if "resource_tracker" not in str(child.cmdline())
    ]
