"""What megatron/faults.py does for interleaved pipelines, and that it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, overridden
from tests.distributed.pipeline_worker import micro_batches
from tests.one_rank import one_rank


def test_interleaved_losses_are_right_with_it_and_wrong_without(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    interleaved = {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    }
    settings = overridden(settings, {"model.hidden_size": 256, "train.global_batch_size": 8})
    config, out = tmp_path / "pipeline.yaml", tmp_path / "out.json"
    config.write_text(yaml.safe_dump(overridden(settings, interleaved)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ROOT / "tests" / "distributed" / "pipeline_worker.py"
    result = subprocess.run(
        [sys.executable, *torchrun, str(worker), str(config), str(out)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    found = json.loads(out.read_text())
    with one_rank(settings, tmp_path) as run:
        batches = micro_batches(run.streams)
        sums = run.forward_backward(batches, len(batches))
        expected = [rows["loss"].sum().item() for rows in sums]
    assert found["ours"] == pytest.approx(expected, rel=1e-5)
    assert found["ours again"] == found["ours"], "nothing is left of the others"
    assert found["not overlapped"] != pytest.approx(expected, rel=1e-5), "mended upstream"
