"""The smallest profile of benchmarks/claims, end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_smoke_profile_runs_every_policy_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/claims", "--profile", "smoke", "--work", str(tmp_path)]
    first = subprocess.run(
        [*command, "--json", str(tmp_path / "a.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert first.returncode == 0, first.stdout + first.stderr
    found = json.loads((tmp_path / "a.json").read_text())
    policies = [row["policy"] for row in found["comparison"]]
    for name in ("uniform", "best static", "DoReMi-style", "ODM", "TiKMiX-D", "TiKMiX-M, rollouts"):
        assert name in policies
    costs = {row["policy"]: row["decision_flops"] for row in found["comparison"]}
    assert costs["uniform"] == 0
    assert costs["TiKMiX-M, rollouts"] > costs["TiKMiX-D"] > 0
    assert all(abs(sum(weights.values()) - 1) < 1e-6 for weights in found["mixtures"].values())

    again = subprocess.run(
        [*command, "--json", str(tmp_path / "b.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,  # nothing is trained again
        check=False,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
