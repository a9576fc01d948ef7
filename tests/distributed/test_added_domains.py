"""A domain that a run is given when it goes on."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import overridden, read_rows
from tests.ranks import train

ADDED = {"data.domains": None, "checkpoint.allow_changed": ["domains"]}


def go_on(settings: dict[str, Any], at: int) -> list[dict[str, Any]]:
    """The ledger of the run gone back to iteration `at`, and given junk from there on."""
    folder = Path(settings["run_dir"]) / "checkpoints"
    for newer in folder.glob("iter_*"):
        if int(newer.name.removeprefix("iter_")) > at:
            shutil.rmtree(newer)
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{at}\n")
    train(overridden(settings, ADDED))
    return read_rows(settings["run_dir"], "mixture.jsonl")


@pytest.mark.parametrize(("at", "starts"), [(8, [0, 4, 8]), (6, [0, 4, 6, 8])])
def test_an_added_domain_gets_its_weight_and_the_others_go_on(
    settings: dict[str, Any], at: int, starts: list[int]
) -> None:
    # At 8 a stage had begun of which nothing was drawn: the new one takes its place.
    plain = copy.deepcopy(settings) | {"checkpoint": {"save_interval": 2}}
    before = train(overridden(plain, {"data.domains": ["low", "high"], "checkpoint.keep": 9}))
    assert before.returncode == 0
    refused = train(overridden(plain, {"data.domains": None, "train.train_iters": 14}), check=False)
    assert refused.returncode == 2
    assert "without domains junk, which the run has added" in refused.stderr
    ledger = go_on(plain, at)
    assert [row["start_iteration"] for row in ledger] == starts
    added = next(row for row in ledger if row["start_iteration"] == at)
    assert added["source"] == "added"
    assert added["weights"]["junk"] == pytest.approx(1 / 3)
    former = ledger[added["stage"] - 1]["weights"]  # that in force: no sample was of another
    ratio = added["weights"]["low"] / added["weights"]["high"]
    assert ratio == pytest.approx(former["low"] / former["high"], rel=1e-6)
    last = read_rows(plain["run_dir"], "metrics.jsonl")[-1]
    assert sum(last["domain_samples"].values()) == 96
    drawn = last["domain_samples"]["junk"]
    assert abs(drawn - sum(_expected(ledger))) < 2
    if at == 6:
        assert ledger[-1]["bank"] is not None
        assert "junk" in ledger[-1]["influence"]["low"]


def _expected(ledger: list[dict[str, Any]]) -> list[float]:
    """Samples of junk that each stage is to draw."""
    ends = [row["start_sample"] for row in ledger[1:]] + [96]
    return [
        row["weights"].get("junk", 0.0) * (end - row["start_sample"])
        for row, end in zip(ledger, ends, strict=True)
    ]
