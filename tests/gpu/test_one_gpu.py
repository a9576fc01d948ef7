"""The same path on one GPU, with NCCL. Skipped without one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
from tests.rollout_runs import (
    DROPOUT,
    THREE,
    candidates,
    losses_of_steps,
    rollouts_of,
    settled,
    state_digests,
)

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.distributed.is_nccl_available()),
    reason="needs a CUDA GPU and NCCL",
)

# Without Transformer Engine, whose kernels take no part of these shapes in float32.
LOCAL = {"model.transformer_impl": "local", "probe.damping": 0.1}
EVERY_LAYER = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}


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


@pytest.mark.parametrize("bf16", [False, True])
def test_rollouts_are_undone_to_the_bit(
    bf16: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Dropout is on, so the card's random streams are part of what is put back."""
    with one_rank(overridden(settings, LOCAL | DROPOUT | {"model.bf16": bf16}), tmp_path) as run:
        train_interval(run, until=4)
        before = settled(run)
        rollouts_of(run).measure(candidates(run.domains, *THREE), seed=7, iters=2)
        assert state_digests(run) == before
        # That the digests see what a step changes, so that equal ones mean something.
        losses_of_steps(run, 2)
        changed = {kind for kind, value in settled(run).items() if value != before[kind]}
        assert changed == set(before) - {"gradient buffers", "gradients", "modes"}


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch use algorithms that give the same bits each time, where it has any."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as torch asks for
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield


def test_neither_a_probe_nor_a_resumption_changes_a_bit(settings: dict[str, Any]) -> None:
    static = DROPOUT | {"model.bf16": True, "remix.policy": "static"}

    def losses(name: str, *launches: dict[str, Any]) -> list[tuple[float, float]]:
        run_dir = f"{settings['run_dir']}-{name}"
        for fields in launches:
            mine = LOCAL | fields | {"run_dir": run_dir, "train.log_interval": 1}
            launch(overridden(settings, mine), change=(deterministic,))
        rows = read_rows(run_dir, "metrics.jsonl")
        return [(row["lm_loss"], row["grad_norm"]) for row in rows]

    expected = losses("plain", static)
    assert len(expected) == 12
    probed = static | {"remix.policy": "tikmix_d", "remix.mode": "advise"}
    assert losses("probed", probed) == expected
    assert losses("resumed", static | {"train.exit_interval": 6}, static) == expected


def test_recomputed_layers_give_the_same_influence(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    matrices = []
    for recomputed in ({}, EVERY_LAYER):
        with one_rank(overridden(settings, LOCAL | recomputed), tmp_path) as run:
            matrices.append(probed(run, curvature="identity").influence_matrix().values_VD)
    scale_V1 = np.abs(matrices[0]).max(axis=1, keepdims=True)
    assert (np.abs(matrices[0] - matrices[1]) / scale_V1).max() < 1e-5


@pytest.mark.parametrize("recomputed", [{}, EVERY_LAYER], ids=["kept", "recomputed"])
def test_a_probe_needs_the_memory_of_a_step_and_of_what_it_keeps(
    recomputed: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """Of a model whose activations outweigh all else, so that they show."""
    wide = {
        "model.hidden_size": 256,
        "model.ffn_hidden_size": 1024,
        "train.micro_batch_size": 32,
        "train.global_batch_size": 32,
        "remix.interval_samples": 128,
        "probe.sub_batch_samples": 32,
        "probe.task_samples": 32,
    }
    with one_rank(overridden(settings, LOCAL | wide | recomputed), tmp_path) as run:
        assert run.probe_plan is not None
        train_interval(run, until=2)
        torch.cuda.reset_peak_memory_stats()
        train_interval(run, until=3)
        of_a_step = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        probed(run)
        of_a_probe = torch.cuda.max_memory_allocated()
    assert of_a_probe <= 1.05 * (of_a_step + run.probe_plan.gradient_bytes)


def probed(run: Run, **fields: Any) -> SubBatchBank:
    """What a probe for stage 1 measures: eight sub-batches of each domain."""
    with probe_of(run, **fields).open(1) as probe:
        return probe.add(np.full(len(probe.domains), 8))


def matrix(row: dict[str, Any]) -> np.ndarray:
    return SubBatchBank.from_json(row["bank"]).influence_matrix().values_VD
