"""A full disk and damaged files cost no more than the checkpoint that they hit."""

from pathlib import Path
from typing import Any

from tests.conftest import launch, overridden, read_rows, without_timings
from tests.unit.training.test_checkpoint_files import flip_a_bit


def test_a_full_disk_and_a_damaged_checkpoint_are_survived(settings: dict[str, Any]) -> None:
    """Saves fail on one rank or the other, in the background; then the newest checkpoint is
    damaged on disk."""
    settings = overridden(settings, {"checkpoint.save_interval": 2, "checkpoint.keep": 9})
    in_background = overridden(settings, {"checkpoint.async_save": True})
    result = launch(in_background, ranks=2, module="tests.distributed.full_disk_worker")
    lines = [line for line in result.stderr.splitlines() if "WAS NOT SAVED" in line]
    for line, iteration in zip(lines, (4, 6, 10), strict=True):
        assert line.startswith("[rank 0] ERROR")
        assert f"THE CHECKPOINT OF ITERATION {iteration} WAS NOT SAVED" in line
        assert "No space left on device; training goes on" in line.replace(
            " (written by rank 1)", ""
        )
    checkpoints = Path(settings["run_dir"]) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "iter_0000002",
        "iter_0000008",
        "iter_0000012",
        "latest_checkpointed_iteration.txt",
    ]
    rows, ledger = (read_rows(settings["run_dir"], f"{n}.jsonl") for n in ("metrics", "mixture"))

    shard = next((checkpoints / "iter_0000012").glob("__1_*.distcp"))
    flip_a_bit(shard)
    result = launch(settings, ranks=2)
    line = next(line for line in result.stderr.splitlines() if "damaged" in line)
    assert f"damaged: rank 0: {shard} does not have the checksum" in line.replace(
        "rank 1", "rank 0"
    )
    assert line.endswith(
        "going on from the checkpoint of iteration 8, the newest one that is whole"
    )
    again = read_rows(settings["run_dir"], "metrics.jsonl")
    assert without_timings(rows) == without_timings(again)
    assert without_timings(ledger) == without_timings(
        read_rows(settings["run_dir"], "mixture.jsonl")
    )


def test_a_stuck_rank_is_named_and_ends_the_job(settings: dict[str, Any]) -> None:
    settings = overridden(settings, {"timeout_minutes": 0.4})
    result = launch(settings, ranks=2, module="tests.distributed.stuck_worker", check=False)
    assert result.returncode != 0
    words = "error: rank 0 waited in vain during iteration 3: rank 1 is stuck or gone"
    assert result.stderr.count(words) == 1
    assert "megatron_tikmix/" not in result.stderr, "a traceback through our own files"
