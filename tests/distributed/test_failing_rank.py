"""A rank that dies or raises takes the job down, with its message; torchrun may start it again."""

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_tikmix.decision.decide import Decider
from megatron_tikmix.measure.probe import InfluenceProbe
from megatron_tikmix.training import loop
from megatron_tikmix.training.checkpoint import Checkpointer
from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import launch, train

FAULTS: dict[str, tuple[Any, str, str]] = {
    "probe": (InfluenceProbe, "add", "1"),
    "solve": (Decider, "decide", "0"),
    "save": (Checkpointer, "_record", "0"),
}


def failing(at: str, failed: str) -> AbstractContextManager[Any]:
    """One rank raises in `at`, once: it makes the file `failed`."""
    owner, name, rank = FAULTS[at]
    function: Callable[..., Any] = getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if os.environ["RANK"] == rank and not Path(failed).exists():
            Path(failed).touch()
            raise RuntimeError(f"a fault in {at}")
        return function(*arguments, **options)

    return mock.patch.object(owner, name, fail)


def killed(failed: str) -> AbstractContextManager[Any]:
    """Rank 1 is killed in iteration 6, once: it makes the file `failed`."""
    train_step = loop.train_step
    steps = iter(range(1, 10**9))

    def kill(*arguments: Any) -> Any:
        if next(steps) == 6 and os.environ["RANK"] == "1" and not Path(failed).exists():
            Path(failed).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*arguments)

    return mock.patch.object(loop, "train_step", kill)


@pytest.mark.parametrize("at", ["probe", "solve", "save"])
def test_a_rank_that_raises_ends_the_job_with_its_message(
    settings: dict[str, Any], tmp_path: Path, at: str
) -> None:
    settings = overridden(settings, {"timeout_minutes": 0.5, "decision_timeout_minutes": 0.5})
    change = failing, at, str(tmp_path / "failed")
    result = launch(settings, ranks=2, check=False, change=change)
    assert result.returncode != 0
    assert f"a fault in {at}" in result.stderr


def test_torchrun_starts_a_job_again_that_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = overridden(settings, {"run_dir": settings["run_dir"] + "_whole"})
    train(whole, ranks=2)
    restarted = overridden(settings, {"checkpoint.save_interval": 2})
    change = killed, str(tmp_path / "failed")
    launch(restarted, ranks=2, max_restarts=1, change=change)
    assert (tmp_path / "failed").exists()
    starts = read_rows(settings["run_dir"], "starts.jsonl")
    assert len(starts) == 2
    ledgers = (read_rows(run["run_dir"], "mixture.jsonl") for run in (whole, restarted))
    first, second = map(without_timings, ledgers)
    assert first == second
