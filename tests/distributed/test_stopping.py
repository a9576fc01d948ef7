"""A run that is told to end does so with a checkpoint and exit code 0, and goes on as if nothing
had happened."""

import multiprocessing
import os
import signal
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_tikmix.training import loop
from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import launch, train


def signalled(name: str, after: int) -> AbstractContextManager[Any]:
    """Rank 1 gets a signal in the step that follows so many, and its loader's workers with it, from
    another process: schedulers signal all those of a job."""
    train_step = loop.train_step
    steps = iter(range(10**9))

    def interrupted(*arguments: Any) -> Any:
        if os.environ["RANK"] == "1" and next(steps) == after:
            processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
            number = getattr(signal, name)
            subprocess.run(["kill", f"-{number}", *(str(p.pid) for p in processes)], check=True)
            time.sleep(0.5)
        return train_step(*arguments)

    return mock.patch.object(loop, "train_step", interrupted)


def test_a_run_ended_early_goes_on_as_the_whole_one(settings: dict[str, Any]) -> None:
    """Ended inside an interval by a signal that one rank and its loader's workers get, then at a
    boundary by the iteration; the rest is that of a run never ended."""
    whole = overridden(settings, {"run_dir": settings["run_dir"] + "_whole"})
    train(whole, ranks=2)

    with_workers = overridden(settings, {"data.num_workers": 1})
    result = launch(with_workers, ranks=2, change=(signalled, "SIGTERM", 1))
    assert result.stderr.count("SIGTERM at iteration 2, which is saved") == 1
    assert saved(settings) == 2

    at_boundary = overridden(settings, {"train.exit_interval": 4})
    result = train(at_boundary, ranks=2)
    assert "ended by train.exit_interval (4) at iteration 4" in result.stderr
    assert len(read_rows(settings["run_dir"], "mixture.jsonl")) == 1
    train(settings, ranks=2)

    rows = {row["iteration"]: row for row in read_rows(settings["run_dir"], "metrics.jsonl")}
    for row in read_rows(whole["run_dir"], "metrics.jsonl"):
        again = rows[row["iteration"]]
        assert again["grad_norm"] == row["grad_norm"]
        assert again["domain_samples"] == row["domain_samples"]
    assert without_timings(read_rows(whole["run_dir"], "mixture.jsonl")) == without_timings(
        read_rows(settings["run_dir"], "mixture.jsonl")
    )


def saved(settings: dict[str, Any]) -> int:
    checkpoints = Path(settings["run_dir"]) / "checkpoints"
    return int((checkpoints / "latest_checkpointed_iteration.txt").read_text())
