"""A run that follows another's ledger reads the same samples, whatever its layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import overridden, read_rows
from tests.ranks import train
from tests.recording import recording

# Batches of 4 up to sample 24, and of 8 from there on; boundaries at samples 32 and 64.
RAMP_UP = {"train.rampup_batch_size": [4, 4, 24], "train.train_iters": 13}


def recorded(settings: dict[str, Any], ranks: int) -> dict[int, list[Any]]:
    """Run it; domain and tokens of each global sample index that was read, all ranks together."""
    folder = Path(settings["run_dir"] + "_samples")
    folder.mkdir(exist_ok=True)
    train(settings, ranks=ranks, change=(recording, str(folder)))
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in read_rows(folder, path.name)]
    found = {index: rest for index, *rest in rows}
    assert len(found) == len(rows), "each index is read once, by one rank"
    assert sorted(found) == list(range(len(found)))
    return found


def test_a_ledger_is_replayed_at_another_data_parallel_size(settings: dict[str, Any]) -> None:
    settings = overridden(settings, RAMP_UP)
    expected = recorded(settings, ranks=1)
    assert len(expected) == 6 * 4 + 7 * 8
    follower = overridden(
        settings,
        {
            "run_dir": settings["run_dir"] + "_follower",
            "remix.policy": "schedule",
            "remix.schedule": settings["run_dir"],
        },
    )
    plan = train(overridden(follower, {"dry_run": True})).stdout
    assert "the mixtures and the samples of" in plan
    assert "stages begin at iterations 0, 7, 11" in plan
    # The second half is resumed, on one rank again.
    leg = overridden(follower, {"train.train_iters": 9, "scheduler.lr_decay_iters": 13})
    assert {i: s for i, s in expected.items() if i < 48} == recorded(leg, ranks=2)
    train(overridden(follower, {"scheduler.lr_decay_iters": 13}))
    ours, theirs = (read_rows(run["run_dir"], "mixture.jsonl") for run in (follower, settings))
    assert [row["source"] for row in ours] == ["initial", "schedule", "schedule"]
    assert [row["source"] for row in theirs][1:] != ["kept", "kept"], "something was decided"
    for field in ("start_sample", "start_iteration", "weights", "domain_samples"):
        assert [row[field] for row in ours] == [row[field] for row in theirs]
    ours, theirs = (read_rows(run["run_dir"], "metrics.jsonl") for run in (follower, settings))
    theirs_by_iteration = {row["iteration"]: row for row in theirs}
    for row in ours:
        if row["iteration"] in theirs_by_iteration and row["iteration"] != 9:
            other = theirs_by_iteration[row["iteration"]]
            assert row["consumed_samples"] == other["consumed_samples"]
            if row["iteration"] != 10:  # its meter began at the resumed iteration
                assert row["lm_loss"] == pytest.approx(other["lm_loss"], rel=1e-5)
    # A schedule whose past is another one is refused.
    stages = [{"start_sample": 0, "weights": {"low": 1}}]
    path = Path(settings["run_dir"] + "_other.json")
    path.write_text(json.dumps(stages))
    other = overridden(follower, {"remix.schedule": str(path), "train.train_iters": 14})
    result = train(other, check=False)
    assert result.returncode == 2
    assert "stage 0 of" in result.stderr
    assert "keep the stages that have begun" in " ".join(result.stderr.split())
