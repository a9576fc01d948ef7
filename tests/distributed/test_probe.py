"""The probe gives what autograd gives on the assembled model, on every layout, in both modes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.influence.bank import SubBatchBank
from tests.conftest import ROOT, overridden
from tests.distributed.probe_worker import SELECTION, VARIANTS
from tests.influence_reference import largest_error, make_ragged, reference
from tests.one_rank import one_rank

OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2x2x2": (
        8,
        {"model.tensor_model_parallel_size": 2, "model.pipeline_model_parallel_size": 2},
    ),
    "tensor 2, sequence parallel": (
        2,
        {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    ),
    "data parallel 2, overlapped": (2, {**OVERLAP, "ddp.bucket_size": 4000}),
    "interleaved pipeline 2 x data 2": (
        4,
        {
            **OVERLAP,
            "model.pipeline_model_parallel_size": 2,
            "model.virtual_pipeline_model_parallel_size": 2,
        },
    ),
}


def probes(settings: dict[str, Any], ranks: int) -> dict[str, dict[str, Any]]:
    """What every variant of the probe measured on this layout."""
    run_dir = Path(settings["run_dir"])
    config, out = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".json")
    config.write_text(yaml.safe_dump(settings))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [
            sys.executable,
            *torchrun,
            str(ROOT / "tests" / "distributed" / "probe_worker.py"),
            str(config),
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-5000:]
    banks: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return banks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_mode_gives_what_autograd_gives(
    layout: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ranks, fields = LAYOUTS[layout]
    settings = overridden(
        settings,
        # Micro-batches of 1: with 4 samples a sub-batch, no layout here needs padding.
        {"train.micro_batch_size": 1, "checkpoint.keep": 1, "probe.damping": 0.1},
    )
    banks = probes(overridden(settings, fields), ranks)
    expected = {}
    with one_rank(settings, tmp_path) as run:  # the checkpoint, on one rank
        assert run.state.iteration == 4
        assert run.remixer is not None
        make_ragged(run.remixer.probe._data)
        for name in VARIANTS:
            curvature, filtered = name.split()[0], name.endswith("filtered")
            key = curvature, filtered
            if key not in expected:
                expected[key] = reference(
                    run,
                    curvature=curvature,
                    stage=1,
                    sub_batch_samples=4,
                    task_samples=12,
                    **({"selects": SELECTION.selects} if filtered else {}),
                )
            bank = SubBatchBank.from_json(banks[name])
            error = largest_error(bank.sums_DBV, bank.tokens_DB, expected[key])
            print(f"{layout}, {name}: {error:.1e}")
            assert error < 1e-5, name
    of_tasks, of_domains = 2 * 12 * 32, 3 * 8 * 4 * 32
    assert banks["adam sharded"]["tokens_passed"] == of_tasks + of_domains
    assert banks["adam replicated"]["tokens_passed"] == of_tasks + of_domains
    assert banks["adam replicated in groups"]["tokens_passed"] == of_tasks + 2 * of_domains
    assert banks["squared_gradients sharded"]["tokens_passed"] == of_tasks + of_domains * 9 // 8
