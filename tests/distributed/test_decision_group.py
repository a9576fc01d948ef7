"""Rank 0 may take its time to decide; and ranks that part ways are told apart."""

import os
import subprocess
import sys

from tests.conftest import ROOT
from tests.distributed.decision_worker import DECISION_TIMEOUT_SECONDS, TIMEOUT_SECONDS


def decide(solve_seconds: float) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ROOT / "tests" / "distributed" / "decision_worker.py"
    return subprocess.run(
        [sys.executable, *torchrun, str(worker), str(solve_seconds)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_a_slow_solve_trips_no_timeout_but_its_own() -> None:
    slow = TIMEOUT_SECONDS + 2
    assert slow < DECISION_TIMEOUT_SECONDS
    result = decide(slow)
    assert result.returncode == 0, result.stderr
    words = (
        "the mixture schedule of rank 1 differs from that of rank 0; see that all of them run "
        "the same code"
    )
    for rank in (0, 1):  # both are told, and so both end
        assert f"rank {rank}: {words}" in result.stdout, result.stderr


def test_a_solve_that_never_ends_is_given_up() -> None:
    result = decide(DECISION_TIMEOUT_SECONDS + 60)
    assert result.returncode != 0
    assert "rank 1: rank 0 is gone, or has not decided within decision_timeout_minutes" in (
        result.stdout
    )
