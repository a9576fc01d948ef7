"""A boundary does nothing to training if the mixture stays; a resumed run is the same run."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import launch, train

DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}


def test_a_probe_does_not_disturb_training(settings: dict[str, Any]) -> None:
    """Dropout is on: a single random number drawn by the probe would change every loss after."""
    plain = overridden(
        settings, {**DROPOUT, "remix.policy": "static", "run_dir": settings["run_dir"] + "_plain"}
    )
    probed = overridden(settings, {**DROPOUT, "remix.mode": "advise"})
    train(plain)
    train(probed)
    assert without_timings(read_rows(plain["run_dir"], "metrics.jsonl")) == without_timings(
        read_rows(probed["run_dir"], "metrics.jsonl")
    )
    stages = read_rows(probed["run_dir"], "mixture.jsonl")
    assert [stage["source"] for stage in stages] == ["initial", "kept", "kept"]
    assert all(stage["probe_tokens"] > 0 for stage in stages[1:])


def test_a_resumed_run_goes_on_bit_for_bit(settings: dict[str, Any]) -> None:
    """Two ranks, dropout on: resumed inside an interval, it crosses a boundary like the other."""
    settings = overridden(
        settings, {**DROPOUT, "checkpoint.save_interval": 3, "checkpoint.keep": 10}
    )
    train(settings, ranks=2)
    whole = Path(settings["run_dir"])
    resumed = whole.with_name("resumed")
    shutil.copytree(whole, resumed)
    # As if it had been killed after iteration 3, with rows written beyond the checkpoint. Rows
    # are due at even iterations: the one of iteration 4 must not remember more than it may.
    latest = resumed / "checkpoints" / "latest_checkpointed_iteration.txt"
    latest.write_text("3\n")
    result = launch(overridden(settings, {"run_dir": str(resumed)}), ranks=2)  # in new processes
    assert "at iteration 3" in result.stderr
    for name in ("metrics.jsonl", "mixture.jsonl"):
        assert without_timings(read_rows(whole, name)) == without_timings(read_rows(resumed, name))


def test_another_layout_resumes_with_the_same_samples(settings: dict[str, Any]) -> None:
    settings = overridden(settings, {"checkpoint.keep": 10})
    train(settings, ranks=2)
    whole = Path(settings["run_dir"])
    resumed = whole.with_name("resumed")
    shutil.copytree(whole, resumed)
    (resumed / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("8\n")
    train(overridden(settings, {"run_dir": str(resumed)}))
    rows, again = read_rows(whole, "metrics.jsonl"), read_rows(resumed, "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [row["iteration"] for row in again]
    for a, b in zip(rows, again, strict=True):
        assert abs(a["lm_loss"] - b["lm_loss"]) < 1e-5 * a["lm_loss"]
    assert without_timings(read_rows(whole, "mixture.jsonl")) == without_timings(
        read_rows(resumed, "mixture.jsonl")
    )


def test_a_run_that_ended_on_a_boundary_can_be_extended(settings: dict[str, Any]) -> None:
    """The boundary it ended on is made up for, and the schedule is that of the configuration."""
    schedule = {"scheduler.lr_decay_iters": 12}
    whole = overridden(settings, {**schedule, "run_dir": settings["run_dir"] + "_whole"})
    train(whole)
    settings = overridden(settings, schedule)
    train(overridden(settings, {"train.train_iters": 4}))
    train(settings)
    rows, again = (read_rows(s["run_dir"], "metrics.jsonl") for s in (whole, settings))
    assert without_timings(rows) == without_timings(again)
    assert without_timings(read_rows(whole["run_dir"], "mixture.jsonl")) == without_timings(
        read_rows(settings["run_dir"], "mixture.jsonl")
    )


def test_a_lost_gradient_stops_the_run_with_a_sentence(settings: dict[str, Any]) -> None:
    result = launch(overridden(settings, {"optimizer.lr": 1e30}), ranks=2, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: the gradient is not finite at iteration") == 1
    assert "megatron_tikmix/" not in result.stderr, "a traceback through our own files"


def test_other_data_is_refused_on_resume(settings: dict[str, Any]) -> None:
    short = overridden(settings, {"train.train_iters": 4})
    train(short)
    state = json.loads(
        (Path(short["run_dir"]) / "checkpoints" / "iter_0000004" / "tikmix.json").read_text()
    )
    assert state["consumed_samples"] == 32
    for override, words in (({"seed": 99}, "seed 1234"), ({"model.num_attention_heads": 2}, "4")):
        result = train(overridden(settings, override), check=False)
        assert result.returncode == 2
        assert f"was saved with {next(iter(override)).strip()} {words.split()[-1]}" in result.stderr
        assert "Traceback" not in result.stderr
