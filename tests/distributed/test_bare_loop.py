"""A Remixer in a bare megatron-core loop decides what it decides in ours."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megatron_tikmix.cli.main import main as cli
from megatron_tikmix.config import load_config
from megatron_tikmix.decision.decide import decide_again
from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.megatron.model import build_model
from tests.conftest import VOCAB_SIZE, overridden, read_rows
from tests.distributed import bare_loop
from tests.ranks import run_on_ranks, train

# Names of both configurations, ours and the bare loop's.
OURS = {"make_vocab_size_divisible_by"}
LOOPS: dict[str, dict[str, Any]] = {
    # Means of micro-batch means, as in Megatron-LM unless told otherwise; averaged over ranks in
    # the collective, and in buckets.
    "data parallel 2, by micro-batch": {
        "pipeline_model_parallel_size": 1,
        "calculate_per_token_loss": False,
        "ddp": {"average_in_collective": True},
    },
    "pipeline parallel 2, by token": {
        "pipeline_model_parallel_size": 2,
        "calculate_per_token_loss": True,
        "ddp": {},
    },
}


@pytest.fixture(scope="module")
def first() -> dict[str, Path]:
    return {}


@pytest.fixture
def ours(settings: dict[str, Any], first: dict[str, Path]) -> Path:
    """Our own run of one rank, made once, and beside it the parameters that it begins with."""
    if not first:
        train(overridden(settings, {"train.log_interval": 1}))
        first["ours"] = Path(settings["run_dir"])
    return first["ours"]


def save_parameters(settings: dict[str, Any], path: Path, stages: int) -> None:
    """The parameters that our run begins with: PATH.0, PATH.1, ... for each pipeline stage."""
    path.with_suffix(".yaml").write_text(yaml.safe_dump(settings))
    config, _ = load_config([str(path.with_suffix(".yaml"))])
    parallel = initialize(config.model, config.seed, 5)
    try:
        (chunk,) = build_model(
            config.model,
            config.ddp,
            vocab_size=VOCAB_SIZE,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            parallel=parallel,
        )
        whole = chunk.module.state_dict()
    finally:
        shut_down()
    per_stage = settings["model"]["num_layers"] // stages
    for stage in range(stages):
        first_layer = stage * per_stage
        mine = {
            (f"decoder.layers.{int(parts[2]) - first_layer}.{parts[3]}" if layer else name): value
            for name, value in whole.items()
            if (parts := name.split(".", 3)) is not None
            and (layer := name.startswith("decoder.layers.")) is not None
            and (not layer or first_layer <= int(parts[2]) < first_layer + per_stage)
            and (layer or _belongs(name, stage, stages))
        }
        if stage == stages - 1 and stages > 1:  # its copy of the tied embedding
            mine["output_layer.weight"] = whole["embedding.word_embeddings.weight"]
        torch.save(mine, f"{path}.{stage}")


def _belongs(name: str, stage: int, stages: int) -> bool:
    return stage == 0 if name.startswith("embedding.") else stage == stages - 1


@pytest.mark.parametrize("loop", LOOPS)
def test_a_bare_loop_decides_what_ours_does(
    loop: str, ours: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    save_parameters(settings, tmp_path / "parameters", LOOPS[loop]["pipeline_model_parallel_size"])
    given = {
        "transformer": {k: v for k, v in settings["model"].items() if k not in OURS},
        "manifest": settings["data"]["manifest"],
        "run_dir": str(tmp_path / "hosted"),
        "optimizer": {"min_lr": 0.0, **settings["optimizer"]},
        "parameters": str(tmp_path / "parameters"),
        **LOOPS[loop],
    }
    run_on_ranks(bare_loop.main, 2, given, str(tmp_path / "out"))
    initial, *theirs = read_rows(tmp_path / "hosted", "mixture.jsonl")
    assert initial["source"] == "initial"
    expected = [row for row in read_rows(ours, "mixture.jsonl") if row["bank"]]
    assert len(theirs) == len(expected) == 2
    for row, reference in zip(theirs, expected, strict=True):
        found, wanted = (
            SubBatchBank.from_json(r["bank"]).influence_matrix().values_VD for r in (row, reference)
        )
        scale_V1 = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(found - wanted) / scale_V1).max() < 1e-4
        assert row["curvature"] == "adam"
        assert row["weights"] == pytest.approx(reference["weights"], abs=1e-3)
        assert row["source"] == reference["source"]
    assert theirs[-1]["weights"] != pytest.approx({"low": 1 / 3, "high": 1 / 3, "junk": 1 / 3})
    # Its ledger is one that the report and the inspection read, and that decides again.
    for answer in (["summary"], ["mixture"], ["influence"], ["why", "low"]):
        assert cli(["inspect", answer[0], given["run_dir"], *answer[1:]]) == 0
    assert cli(["report", given["run_dir"]]) == 0
    ledger = Ledger.read(given["run_dir"])
    assert decide_again(ledger, 1).mixture == ledger[1].mixture
    if LOOPS[loop]["pipeline_model_parallel_size"] > 1:  # of the whole batch, on the last stage
        sums = json.loads((tmp_path / "out.losses").read_text())
        losses = [loss / tokens for loss, tokens in sums]
        logged = [row["lm_loss"] for row in read_rows(ours, "metrics.jsonl")]
        assert losses == pytest.approx(logged, rel=1e-5)
