"""A rank that dies or raises takes the job down, with its message; torchrun may start it again."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import launch, overridden, read_rows, without_timings

WORKER = "tests.distributed.failing_worker"


@pytest.mark.parametrize("at", ["probe", "solve", "save"])
def test_a_rank_that_raises_ends_the_job_with_its_message(
    settings: dict[str, Any], tmp_path: Path, at: str
) -> None:
    settings = overridden(settings, {"timeout_minutes": 0.5, "decision_timeout_minutes": 0.5})
    environment = {"FAIL_AT": at, "FAILED": str(tmp_path / "failed")}
    result = launch(settings, ranks=2, check=False, module=WORKER, **environment)
    assert result.returncode != 0
    assert f"a fault in {at}" in result.stderr


def test_torchrun_starts_a_job_again_that_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = overridden(settings, {"run_dir": settings["run_dir"] + "_whole"})
    launch(whole, ranks=2)
    environment = {"FAIL_AT": "step", "FAILED": str(tmp_path / "failed")}
    restarted = overridden(settings, {"checkpoint.save_interval": 2})
    launch(restarted, ranks=2, module=WORKER, max_restarts=1, **environment)
    assert (tmp_path / "failed").exists()
    starts = read_rows(settings["run_dir"], "starts.jsonl")
    assert len(starts) == 2
    ledgers = (read_rows(run["run_dir"], "mixture.jsonl") for run in (whole, restarted))
    first, second = map(without_timings, ledgers)
    assert first == second
