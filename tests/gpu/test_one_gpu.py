"""The same path on a GPU, with NCCL. Skipped without one."""

from typing import Any

import pytest
import torch

from tests.conftest import launch, overridden, read_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("bf16", [False, True])
def test_trains_probes_and_resets(settings: dict[str, Any], bf16: bool) -> None:
    launch(overridden(settings, {"model.bf16": bf16}))
    losses = [row["lm_loss"] for row in read_rows(settings["run_dir"], "metrics.jsonl")]
    assert losses[-1] < losses[0]
    stages = read_rows(settings["run_dir"], "mixture.jsonl")
    assert len(stages) == 3
    assert all(stage["influence"] for stage in stages[1:])
