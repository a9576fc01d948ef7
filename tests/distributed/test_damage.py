"""A full disk and damaged files cost no more than the checkpoint that they hit."""

import errno
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_tikmix.megatron.faults import writes_of_one_rank
from megatron_tikmix.training import loop
from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import launch, train
from tests.unit.training.test_checkpoint_files import flip_a_bit

FULL_FOR = {"save_common": "iter_0000006", "finish": "iter_0000010"}


@contextmanager
def full_disk() -> Iterator[None]:
    """The disk is full at iteration 4 for the tensors of rank 1, and at 6 and 10 for what rank 0
    writes first, and last."""
    with ExitStack() as changes:
        # In the writers' own processes, where megatron-core opens its files.
        write_item = full_for_tensors(filesystem_async._write_item)
        changes.enter_context(mock.patch.object(filesystem_async, "_write_item", write_item))
        for owner, name in writes_of_one_rank():
            if name in FULL_FOR:
                write = full_for(getattr(owner, name), FULL_FOR[name])
                changes.enter_context(mock.patch.object(owner, name, write))
        yield


def full_for_tensors(write: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(write)  # megatron-core looks at its signature
    def write_or_fail(*arguments: Any, **options: Any) -> Any:
        stream = next(value for value in arguments if hasattr(value, "fileno"))
        if os.environ["RANK"] == "1" and "iter_0000004" in stream.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments, **options)

    return write_or_fail


def full_for(write: Callable[..., None], folder: str) -> Callable[..., None]:
    def write_or_fail(*arguments: Any, **options: Any) -> None:
        place = f"{arguments} {getattr(arguments[0], 'checkpoint_dir', '')}"
        if os.environ["RANK"] == "0" and folder in place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments, **options)

    return write_or_fail


def stuck() -> AbstractContextManager[Any]:
    """Rank 1 gets stuck in iteration 3."""
    train_step = loop.train_step
    steps = iter(range(1, 10**9))

    def stick(*arguments: Any) -> Any:
        if next(steps) == 3 and os.environ["RANK"] == "1":
            time.sleep(300)
        return train_step(*arguments)

    return mock.patch.object(loop, "train_step", stick)


def test_a_full_disk_and_a_damaged_checkpoint_are_survived(settings: dict[str, Any]) -> None:
    """Saves fail on one rank or the other, in the background; then the newest checkpoint is
    damaged on disk."""
    settings = overridden(settings, {"checkpoint.save_interval": 2, "checkpoint.keep": 9})
    in_background = overridden(settings, {"checkpoint.async_save": True})
    result = launch(in_background, ranks=2, change=(full_disk,))
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
    result = train(settings, ranks=2)
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
    result = launch(settings, ranks=2, change=(stuck,), check=False)
    assert result.returncode != 0
    words = "error: rank 0 got no answer during iteration 3: rank 1 is stuck or gone"
    assert result.stderr.count(words) == 1
    assert "megatron_tikmix/" not in result.stderr, "a traceback through our own files"
