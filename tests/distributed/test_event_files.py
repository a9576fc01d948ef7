"""The event files of real runs against the ledger and the metrics beside them, value by value."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.monitoring.words import decision_in_words
from tests.conftest import overridden, read_rows
from tests.ranks import train
from tests.tensorboard_values import assert_same, expected_scalars, read_back, undocumented


def test_every_value_is_that_of_the_ledger_or_the_metrics(
    settings: dict[str, Any], prompts: Path
) -> None:
    """One rank and then two, audits, completions; a run that ended, and was gone on with."""
    settings = overridden(
        settings,
        {
            "tasks.quiz": {"prompts": str(prompts), "weight": 0.1},
            "audit": {"enabled": True, "iters": 1},
            "scheduler.lr_decay_iters": 12,
        },
    )
    train(overridden(settings, {"train.train_iters": 8}))
    train(settings, ranks=2)
    run_dir = Path(settings["run_dir"])
    ledger, metrics = (read_rows(run_dir, f"{name}.jsonl") for name in ("mixture", "metrics"))
    assert [row["start_iteration"] for row in ledger] == [0, 4, 8]
    assert any(row["audit"] for row in ledger)
    assert all(row["memory_bytes"] > 50e6 for row in metrics)

    log_dir = run_dir / "tensorboard"
    assert len(list(log_dir.iterdir())) == 2  # each start one file, of one rank
    scalars, texts = read_back(log_dir)
    assert_same(scalars, expected_scalars(ledger, metrics, settings["data"]["sequence_length"]))
    rows = Ledger.read(run_dir)
    assert texts == {
        row.start_iteration: decision_in_words(former, row)
        for former, row in zip([None, *rows], rows, strict=False)
    }
    events = EventAccumulator(str(log_dir), size_guidance={"images": 0})
    events.Reload()
    heat_maps = events.Images("influence/heat_map")
    assert [image.step for image in heat_maps] == [4, 8]
    unlisted, unseen = undocumented(
        [*{tag for tag, _ in scalars}, "influence/heat_map", "mixture/decision"]
    )
    assert (unlisted, unseen) == (set(), set())
