"""What megatron/faults.py does for interleaved pipelines, and that it is needed."""

from pathlib import Path
from typing import Any

import pytest

from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.megatron.samples import Sample, stack
from megatron_tikmix.training.build import build_training
from tests.conftest import overridden
from tests.one_rank import one_rank
from tests.ranks import run_on_ranks
from tests.rollout_runs import job, load_settings

VARIANTS = {
    "ours": {},
    "not overlapped": {"overlap_p2p_comm": False, "batch_p2p_comm": True},
    "ours again": {},
}


def micro_batches(streams: list[DomainStream]) -> list[Sample]:
    """Eight of two samples."""
    return [stack([streams[0][n], streams[1][n]]) for n in range(8)]


def losses(settings: dict[str, Any]) -> dict[str, list[float]]:
    """The losses of the micro-batches in each variant; none but on the last stage."""
    config, _ = load_settings(settings)
    with job(settings) as parallel:
        data = TrainingData(config)
        forward_backward, _, _ = build_training(
            config, data.manifest.vocab_size, data.boundaries, parallel
        )
        batches = micro_batches(data.streams)
        found = {}
        model_config = forward_backward.model[0].config
        for name, fields in VARIANTS.items():
            former = {field: getattr(model_config, field) for field in fields}
            vars(model_config).update(fields)
            for chunk in forward_backward.model:
                chunk.zero_grad_buffer()
            sums = forward_backward(batches, len(batches))
            vars(model_config).update(former)
            found[name] = [rows["loss"].sum().item() for rows in sums]
        return found


def test_interleaved_losses_are_right_with_it_and_wrong_without(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    interleaved = {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    }
    settings = overridden(settings, {"model.hidden_size": 256, "train.global_batch_size": 8})
    _, found = run_on_ranks(losses, 2, overridden(settings, interleaved))
    with one_rank(settings, tmp_path) as run:
        batches = micro_batches(run.streams)
        sums = run.forward_backward(batches, len(batches))
        expected = [rows["loss"].sum().item() for rows in sums]
    assert found["ours"] == pytest.approx(expected, rel=1e-5)
    assert found["ours again"] == found["ours"], "nothing is left of the others"
    assert found["not overlapped"] != pytest.approx(expected, rel=1e-5), "mended upstream"
