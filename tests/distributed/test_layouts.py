"""Another layout gives the same numbers, from scratch; another parallel run the same bits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tikmix.influence.bank import SubBatchBank
from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import train

LAYOUTS = {
    "data parallel": {},
    "tensor parallel": {"model.tensor_model_parallel_size": 2},
    "sequence parallel": {
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
    },
    "sequence parallel with torch's attention": {
        "model.tensor_model_parallel_size": 2,
        "model.sequence_parallel": True,
        "model.attention_backend": "flash",
    },
    "pipeline parallel": {"model.pipeline_model_parallel_size": 2},
    "interleaved pipeline parallel": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    },
}


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def settings(settings: dict[str, Any], prompts: Path) -> dict[str, Any]:
    """With a task of each kind; `low` and `high` decide."""
    held_out = Path(settings["data"]["manifest"]).parent / "junk_validation"
    tasks = {
        "tasks.quiz": {"prompts": str(prompts), "weight": 0.1},
        "tasks.extra": {"prefix": str(held_out), "weight": 0.1},
    }
    return overridden(settings, {**tasks, "remix.influence": "joint"})


@pytest.fixture
def reference(settings: dict[str, Any], runs: dict[str, Path]) -> Path:
    """The run of one rank that the others are held against."""
    if "reference" not in runs:
        # A folder of its own: a layout that found this run in its own would resume it, finished.
        alone = overridden(settings, {"run_dir": settings["run_dir"] + "-reference"})
        train(alone)
        runs["reference"] = Path(alone["run_dir"])
    return runs["reference"]


def matrices(run_dir: Path) -> list[np.ndarray]:
    """S_VD of every boundary, with the domains' own rows."""
    return [
        SubBatchBank.from_json(stage["bank"]).influence_matrix().values_VD
        for stage in read_rows(run_dir, "mixture.jsonl")
        if stage["bank"]
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_give_the_numbers_of_one(
    layout: str, reference: Path, settings: dict[str, Any], runs: dict[str, Path]
) -> None:
    train(overridden(settings, LAYOUTS[layout]), ranks=2)
    run_dir = Path(settings["run_dir"])
    runs[layout] = run_dir
    ours, theirs = read_rows(run_dir, "metrics.jsonl"), read_rows(reference, "metrics.jsonl")
    assert [row["iteration"] for row in ours] == [row["iteration"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-5)
        assert a["domain_loss"] == pytest.approx(b["domain_loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        if "task_loss" in b:
            assert set(a["task_loss"]) == {"low", "high", "quiz", "extra"}
            assert a["task_loss"] == pytest.approx(b["task_loss"], rel=1e-4)
            assert list(a["task_bits_per_byte"]) == ["quiz"]
    found, expected = matrices(run_dir), matrices(reference)
    assert len(found) == len(expected) == 2
    assert found[0].shape == (4 + 3, 3)
    assert largest_error(found[0], expected[0]) < 1e-4
    weights = [stage["weights"] for stage in read_rows(run_dir, "mixture.jsonl")]
    expected_weights = [stage["weights"] for stage in read_rows(reference, "mixture.jsonl")]
    for a, b in zip(weights, expected_weights, strict=True):
        assert a == pytest.approx(b, abs=1e-3)


OTHER_MODEL = {
    # conftest's model has LayerNorm, GELU and biases; so what is left is:
    "model.share_embeddings_and_output_weights": False,
    "model.num_query_groups": 2,
    "model.position_embedding_type": "learned_absolute",
    "model.normalization": "RMSNorm",
    "model.qk_layernorm": True,
    "model.gated_linear_unit": True,
    "model.activation_func": "torch.nn.functional.silu",
    "model.add_bias_linear": False,
}


@pytest.mark.parametrize("fields", [{}, OTHER_MODEL], ids=["tied, GELU, rope", "other options"])
def test_tensor_and_pipeline_ranks_give_the_numbers_of_one_whatever_the_model(
    fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    short = {**fields, "train.train_iters": 6, "remix.influence": "marginal"}
    alone = overridden(settings, {**short, "run_dir": settings["run_dir"] + "-reference"})
    train(alone)
    layout = {
        "model.tensor_model_parallel_size": 2,
        "model.pipeline_model_parallel_size": 2,
        "model.sequence_parallel": True,
    }
    train(overridden(settings, {**short, **layout}), ranks=4)
    run_dir, reference = Path(settings["run_dir"]), Path(alone["run_dir"])
    rows = zip(
        read_rows(run_dir, "metrics.jsonl"), read_rows(reference, "metrics.jsonl"), strict=True
    )
    for a, b in rows:
        assert a["lm_loss"] == pytest.approx(b["lm_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    (found,), (expected,) = matrices(run_dir), matrices(reference)
    assert largest_error(found, expected) < 1e-4


def largest_error(found_VD: np.ndarray, expected_VD: np.ndarray) -> float:
    """Relative to the largest entry of each row."""
    scale_V1 = np.abs(expected_VD).max(axis=1, keepdims=True)
    return float((np.abs(found_VD - expected_VD) / scale_V1).max())


def test_the_same_run_twice_gives_the_same_bits(
    settings: dict[str, Any], runs: dict[str, Path]
) -> None:
    train(overridden(settings, {"model.hidden_dropout": 0.1}), ranks=2)
    again = overridden(
        settings, {"model.hidden_dropout": 0.1, "run_dir": settings["run_dir"] + "2"}
    )
    train(again, ranks=2)
    for name in ("metrics.jsonl", "mixture.jsonl"):
        first, second = (read_rows(s["run_dir"], name) for s in (settings, again))
        assert without_timings(first) == without_timings(second)
