"""Bad input: one sentence, exit code 2, before training starts; never a traceback or a hang."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.__main__ import main
from tests.conftest import overridden, write_tokens
from tests.ranks import launch

CASES = {
    "unknown field": ({"model.hiden_size": 64}, "did you mean model.hidden_size?"),
    "unknown section": ({"trian.iters": 64}, "unknown configuration field trian"),
    "wrong type": ({"train.train_iters": "many"}, "train.train_iters"),
    "missing manifest": ({"data.manifest": "nowhere.yaml"}, "nowhere.yaml"),
    "unknown domain of a task": ({"tasks.law.domain": "law"}, "tasks.law.domain"),
    "a task of two kinds": ({"tasks.low.prefix": "x"}, "tasks.low must have one of domain, prefix"),
    "a task of no kind": ({"tasks.law": {"weight": 2.0}}, "and prompts, and has none"),
    "a task on missing tokens": (
        {"tasks.law": {"prefix": "no/where"}},
        "tasks.law.prefix names it",
    ),
    "a task on missing prompts": ({"tasks.law": {"prompts": "no.jsonl"}}, "no.jsonl: no such file"),
    "unknown domain": ({"data.domains": ["low", "law"]}, "law"),
    "negative weight": ({"data.initial_mixture": {"low": -1.0, "high": 2.0}}, "zero or more"),
    "weight that is no number": ({"data.initial_mixture": {"low": float("nan")}}, "low"),
    "weights all zero": ({"data.initial_mixture": {"low": 0.0}}, "data.initial_mixture"),
    "weight of an unknown domain": ({"data.initial_mixture": {"law": 1.0}}, "law"),
    "world size": ({"model.tensor_model_parallel_size": 2}, "2 ranks, and 1 were launched"),
    "batch size": ({"train.micro_batch_size": 3}, "train.global_batch_size (8) must be a multiple"),
    "interval": ({"remix.interval_samples": 30}, "the nearest are 24 and 32"),
    "unsettled second moment": ({"optimizer.adam_beta2": 0.999}, "second moment has settled"),
    "domain shorter than a sample": ({"data.sequence_length": 20000}, "do not fill one sample"),
    "layout": ({"model.num_layers": 2, "model.num_attention_heads": 5}, "num_attention_heads"),
    "unsupported": ({"model.context_parallel_size": 2}, "context_parallel_size"),
    "document masks and Transformer Engine": (
        {"data.reset_attention_mask": True, "model.transformer_impl": "transformer_engine"},
        "data.reset_attention_mask needs model.transformer_impl local",
    ),
    "beta": ({"optimizer.adam_beta2": 1.0}, "optimizer.adam_beta2 (1.0)"),
    "no domains": ({"data.domains": []}, "data.domains"),
    "a domain twice": ({"data.domains": ["low", "low"]}, "each once"),
    "heads and groups": ({"model.num_query_groups": 3}, "num_query_groups"),
    "no learning rate": ({"optimizer.lr": None}, "optimizer.lr must be given"),
    "warm-up": ({"scheduler.lr_warmup_iters": 50}, "scheduler.lr_warmup_iters (50)"),
    "sequence parallel": ({"model.sequence_parallel": True}, "model.sequence_parallel"),
    "sub-batches": ({"probe.sub_batches": 2}, "probe.sub_batches"),
    "constraints that conflict": (
        {"remix.constraints": {"lower": {"low": 0.6}, "upper": {"low": 0.5}}},
        "the constraints lower:low, upper:low cannot hold together: they miss by 0.1",
    ),
    "constraint on an unknown domain": ({"remix.constraints": {"fixed": ["law"]}}, "law"),
    "a start of neither kind": ({"remix.start": 1.5}, "remix.start"),
    "an audit that is required and not made": ({"remix.require_audit": True}, "audit.enabled"),
    "a ramp-up that leads elsewhere": (
        {"train.rampup_batch_size": [2, 4, 100]},
        "train.rampup_batch_size: a batch-size ramp-up [2, 4, 100] does not lead to batches of 8",
    ),
    "ramp-up and micro-batches": (
        {"train.rampup_batch_size": [4, 1, 100]},
        "train.rampup_batch_size gives batches of 5, which must be a multiple of micro_batch_size",
    ),
    "a policy without its schedule": ({"remix.policy": "schedule"}, "remix.schedule goes with"),
    "a schedule that is not there": (
        {"remix.policy": "schedule", "remix.schedule": "nowhere.yaml"},
        "remix.schedule: nowhere.yaml: no such schedule",
    ),
    "a domain that runs dry": (
        # 12 iterations × 8 samples, a third of them from each domain of some 150 samples.
        {"remix.policy": "static", "remix.constraints.max_epochs": {"low": 0.1}},
        "domain low would run dry at sample",
    ),
    "a domain that runs dry before the first reset": (
        {"remix.constraints.max_epochs": {"low": 0.01}},
        "by the first reset, at iteration 4, its mixture takes",
    ),
    "a baseline that is not there": (
        {"baseline": "nowhere"},
        "baseline nowhere is not a directory",
    ),
    "precision without a limit": ({"probe.precision": 0.05}, "probe.max_tokens or"),
}


def refused(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which this process refuses the run."""
    config = Path(settings["run_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    assert main([str(config)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert not Path(settings["run_dir"]).exists()
    return error


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_sentence(
    case: str, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, words = CASES[case]
    assert words in refused(overridden(settings, overrides), capsys)


@pytest.mark.parametrize("damage", ["missing .bin", "missing .idx", "short .bin", "short .idx"])
def test_damaged_files_are_named(
    damage: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import build_corpus

    (tmp_path / "corpus").mkdir()
    manifest = build_corpus(tmp_path / "corpus")
    kind, suffix = damage.split()
    file = manifest.parent / f"high_train{suffix}"
    if kind == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10])
    assert f"high_train{suffix}" in refused(
        overridden(settings, {"data.manifest": str(manifest)}), capsys
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        # Seen by each rank alone, before they are connected; and by all together, after.
        ({"train.global_batch_size": 6}, "train.global_batch_size"),
        ({"data.sequence_length": 20000}, "do not fill one sample"),
    ],
)
def test_two_ranks_refuse_together(
    overrides: dict[str, Any], words: str, settings: dict[str, Any]
) -> None:
    """One rank speaks; each exits with 2, which torchrun reports in its own words below."""
    result = launch(overridden(settings, overrides), ranks=2, check=False)
    assert result.returncode != 0
    ours = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(ours) == 1
    assert words in ours[0]
    assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", result.stderr)
    assert "megatron_tikmix/" not in result.stderr, "a traceback through our own files"


def test_a_run_dir_that_is_a_file_is_refused(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(overridden(settings, {"run_dir": str(tmp_path / "file")})))
    assert main([str(config)]) == 2
    assert f"run_dir {tmp_path / 'file'} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["abc", "", "77"])
def test_a_damaged_checkpoint_pointer_is_named(
    content: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pointer = Path(settings["run_dir"]) / "checkpoints" / "latest_checkpointed_iteration.txt"
    pointer.parent.mkdir(parents=True)
    pointer.write_text(content)
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main([str(config)]) == 2
    assert f"{pointer} does not name a whole checkpoint" in capsys.readouterr().err


def test_write_tokens_is_read_back(tmp_path: Path) -> None:
    """The fixtures' own files are what Megatron reads."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    split = write_tokens(tmp_path / "x", [np.arange(5), np.arange(7)])
    data = IndexedDataset(str(split.prefix))
    assert [data[i].tolist() for i in range(2)] == [list(range(5)), list(range(7))]
