"""The quickstart, made short: from text on this machine to a report, on two ranks."""

import html
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tikmix.__main__ import main
from tests.conftest import ROOT, overridden, read_rows
from tests.ranks import launch


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus and the manifest, as the Makefile makes them, smaller."""
    folder = tmp_path_factory.mktemp("quickstart")
    for command in (
        ["build_corpus.py", "--output", "corpus", "--max_bytes_per_domain", "150000"],
        ["preprocess_data.py", "--input", "corpus", "--output", ".", "--train_tokenizer"],
    ):
        tool = str(ROOT / "tools" / command[0])
        subprocess.run(
            [sys.executable, tool, *command[1:]], cwd=folder, check=True, capture_output=True
        )
    return folder


@pytest.fixture
def short(prepared: Path, tmp_path: Path) -> dict[str, Any]:
    """examples/quickstart.yaml for 12 iterations, with boundaries after 5 and 10."""
    return overridden(
        yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text()),
        {
            "run_dir": str(tmp_path / "run"),
            "data.manifest": str(prepared / "domains.yaml"),
            "train.train_iters": 12,
            "train.log_interval": 2,
            "scheduler.lr_warmup_iters": 2,
            "optimizer.adam_beta2": 0.4,
            "remix.first_interval_samples": 80,
            "remix.interval_samples": 80,
            "probe.task_samples": 8,
            "probe.max_overhead": None,
            "evaluate.task_samples": 8,
        },
    )


def test_from_text_to_report(short: dict[str, Any]) -> None:
    result = launch(short, ranks=2)
    run_dir = Path(short["run_dir"])
    metrics, ledger = (read_rows(run_dir, f"{name}.jsonl") for name in ("metrics", "mixture"))

    assert [row["iteration"] for row in metrics] == [2, 4, 5, 6, 8, 10, 12]
    assert [row["start_iteration"] for row in ledger] == [0, 5, 10]
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]
    assert metrics[-1]["consumed_samples"] == 12 * 16
    for row, stage in ((metrics[2], ledger[1]), (metrics[5], ledger[2])):
        assert row["task_loss"] == stage["task_loss"]
    assert ledger[0]["weights"] == pytest.approx(dict.fromkeys(ledger[0]["weights"], 1 / 6))
    for stage in ledger[1:]:
        assert sum(stage["weights"].values()) == 1.0
        assert stage["source"] in ("tikmix_d", "kept")
        for task in short["tasks"]:
            assert stage["influence"][task].keys() == stage["weights"].keys()
            assert max(stage["influence_se"][task].values()) > 0
        # 8 sub-batches of 8 samples for each domain; 8 samples for each task and domain's own row.
        assert stage["probe_tokens"] == (6 * 8 * 8 + (4 + 6) * 8) * 128
        assert sum(stage["domain_samples"].values()) == stage["start_sample"]

    assert "stage 1, after iteration 5" in result.stderr
    assert "of all tokens processed" in result.stderr
    assert "tensorboard --logdir" in result.stderr
    check_tensorboard(run_dir / "tensorboard", ledger, metrics)
    report = html.unescape((run_dir / "report.html").read_text())
    assert all(domain in report for domain in ledger[0]["weights"])
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "12\n"
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["train_iters"] == 12


def check_tensorboard(
    folder: Path, ledger: list[dict[str, Any]], metrics: list[dict[str, Any]]
) -> None:
    events = EventAccumulator(str(folder)).Reload()

    def points(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in events.Scalars(tag)}

    assert points("lm loss") == pytest.approx({row["iteration"]: row["lm_loss"] for row in metrics})
    for stage in ledger:
        step = stage["start_iteration"]
        for domain, weight in stage["weights"].items():
            assert points(f"mixture/weight/{domain}")[step] == pytest.approx(weight)
            for task in stage["influence"] or {}:
                value = points(f"influence/{task}/{domain}")[step]
                assert value == pytest.approx(stage["influence"][task][domain], rel=1e-6)
        for task, loss in stage["task_loss"].items():
            assert points(f"validation/loss/{task}")[step] == pytest.approx(loss)
    realised = [points(f"mixture/realised/{domain}")[5] for domain in ledger[0]["weights"]]
    assert sum(realised) == pytest.approx(1.0)
    assert max(realised) - min(realised) < 2 / 80, "within a sample of uniform, at a stage's end"


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    short: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(short))
    assert main([str(config), "--dry_run", "true", "--model.tensor_model_parallel_size", "2"]) == 0
    plan = capsys.readouterr().out
    assert "4 ranks = tensor 2 × pipeline 1 × data 2" in plan
    assert "2 boundaries, every 5 iterations" in plan
    assert "4 tasks + 6 own gradients of domains = 464 samples (59,392 tokens" in plan
    assert "580.0% of an interval's tokens (no limit), 85.3% of the compute" in plan
    assert not Path(short["run_dir"]).exists()
