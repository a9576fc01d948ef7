"""The same path on one GPU, with NCCL. Skipped without one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.training.loop import Run, train_interval
from tests.conftest import overridden, read_rows
from tests.influence_reference import largest_error, make_ragged, probe_of, reference
from tests.one_rank import one_rank
from tests.ranks import launch

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.distributed.is_nccl_available()),
    reason="needs a CUDA GPU and NCCL",
)

# Without Transformer Engine, whose kernels take no part of these shapes in float32.
LOCAL = {"model.transformer_impl": "local", "probe.damping": 0.1}


@pytest.mark.parametrize("bf16", [False, True])
def test_trains_probes_and_resets(settings: dict[str, Any], bf16: bool) -> None:
    result = launch(overridden(settings, {"model.bf16": bf16, "train.train_iters": 24}))
    losses = [row["lm_loss"] for row in read_rows(settings["run_dir"], "metrics.jsonl")]
    assert losses[-1] < losses[0]
    stages = read_rows(settings["run_dir"], "mixture.jsonl")
    assert len(stages) == 6
    assert all(stage["influence"] for stage in stages[1:])
    assert "kernels" in result.stderr


def test_micro_batches_of_any_size_give_the_same_numbers(settings: dict[str, Any]) -> None:
    rows = {}
    for size in (1, 4):
        mine = {"train.micro_batch_size": size, "run_dir": f"{settings['run_dir']}-{size}"}
        launch(overridden(settings, LOCAL | mine))
        rows[size] = (
            [row["lm_loss"] for row in read_rows(mine["run_dir"], "metrics.jsonl")],
            [matrix(row) for row in read_rows(mine["run_dir"], "mixture.jsonl")[1:]],
        )
    (losses, matrices), (other_losses, other_matrices) = rows.values()
    assert losses == pytest.approx(other_losses, rel=1e-5)
    scale_V1 = np.abs(matrices[0]).max(axis=1, keepdims=True)
    assert (np.abs(matrices[0] - other_matrices[0]) / scale_V1).max() < 1e-4


@pytest.mark.parametrize("curvature", ["identity", "adam", "squared_gradients"])
@pytest.mark.parametrize("mode", ["sharded", "replicated"])
def test_the_probe_gives_what_autograd_gives(
    curvature: str, mode: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with one_rank(overridden(settings, LOCAL), tmp_path) as run:
        assert run.parallel.device.type == "cuda"
        train_interval(run, until=4)
        assert run.remixer is not None
        make_ragged(run.remixer.probe._data)
        bank = probed(run, curvature=curvature, data_parallel_mode=mode)
        expected = reference(
            run, curvature=curvature, stage=1, sub_batch_samples=4, task_samples=12
        )
    assert largest_error(bank.sums_DBV, bank.tokens_DB, expected) < 1e-4


def test_bf16_influence_agrees_with_fp32(settings: dict[str, Any], tmp_path: Path) -> None:
    matrices = []
    for bf16 in (False, True):
        with one_rank(overridden(settings, LOCAL | {"model.bf16": bf16}), tmp_path) as run:
            bank = probed(run, curvature="identity")  # at the same parameters: none was trained
            matrices.append(bank.influence_matrix().values_VD.ravel())
    assert np.corrcoef(*matrices)[0, 1] >= 0.99


def test_transformer_engine_is_used_where_it_is(settings: dict[str, Any]) -> None:
    pytest.importorskip("transformer_engine")
    result = launch(overridden(settings, {"model.bf16": True}))
    assert "attention Transformer Engine TEDotProductAttention" in result.stderr
    assert "optimizer Transformer Engine FusedAdam" in result.stderr


def probed(run: Run, **fields: Any) -> SubBatchBank:
    """What a probe for stage 1 measures: eight sub-batches of each domain."""
    with probe_of(run, **fields).open(1) as probe:
        return probe.add(np.full(len(probe.domains), 8))


def matrix(row: dict[str, Any]) -> np.ndarray:
    return SubBatchBank.from_json(row["bank"]).influence_matrix().values_VD
