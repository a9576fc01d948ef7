"""An update whose gradient is not finite is skipped, and the run stops when that goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tikmix.errors import TrainingError
from megatron_tikmix.training.loop import train_interval
from tests.conftest import overridden
from tests.one_rank import one_rank


def test_a_lost_gradient_changes_nothing(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """NaN in one entry of iteration 2's gradient; parameters and moments are those before it."""
    settings = overridden(settings, {"train.max_skipped_iterations": 2})
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=1)
        model = run.forward_backward.model
        before = [value.detach().clone() for chunk in model for value in chunk.parameters()]
        config = model[0].config
        finalize, lose = config.finalize_model_grads_func, True

        def losing(chunks: Any, *arguments: Any, **options: Any) -> None:
            finalize(chunks, *arguments, **options)
            if lose:
                chunks[0].buffers[0].grad_data[5] = torch.nan

        config.finalize_model_grads_func = losing
        row = train_interval(run, until=2)
        after = [value.detach() for chunk in model for value in chunk.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert run.state.skipped_iterations == 1
        assert row["skipped_iterations"] == 1
        assert row["consumed_samples"] == 16

        lose = False
        row = train_interval(run, until=3)
        after = [value.detach() for chunk in model for value in chunk.parameters()]
        assert not any(torch.isnan(value).any() for value in after)
        assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert row["lm_loss"] > 0

        lose = True
        with pytest.raises(TrainingError, match="at iteration 5, nor at the 1 before"):
            train_interval(run, until=8)
        assert run.state.skipped_iterations == 3
