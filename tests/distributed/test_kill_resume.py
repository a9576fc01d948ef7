"""SIGKILLs at random moments, of both ranks and of one: the run that ends is the one never killed.

`benchmarks/kill_resume.py` says how. It fails on any difference in parameters, optimizer state,
ledger, metrics, or in which samples were consumed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    figures = tmp_path / "kills.json"
    command = ["benchmarks/kill_resume.py", "--kills", "8", "--seed", "3", "--json", str(figures)]
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )
    print(result.stdout)  # the seed
    assert result.returncode == 0, result.stderr
    found = json.loads(figures.read_text())
    assert len(found["kills"]) >= 8
    assert {kill["ranks"] for kill in found["kills"]} == {1, 2}
    assert [run["differs"] for run in found["runs"]] == [[]] * len(found["runs"])
