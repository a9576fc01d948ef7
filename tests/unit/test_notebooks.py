"""Notebooks run from top to bottom, on a run made here, and are stored without their outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tikmix.config import ConstraintsConfig, RemixConfig
from megatron_tikmix.decision.decide import Boundary, Decider
from megatron_tikmix.decision.ledger import LEDGER, Ledger, StageRow
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.mixture.mixture import Mixture
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
DECIDE_AGAIN = ROOT / "examples" / "notebooks" / "decide_again.ipynb"

DOMAINS, TASKS = ["web", "code", "noise"], ["questions", "programs"]
BENEFIT_DV = np.array([[1.0, 0.5], [0.6, 1.0], [0.0, 0.0]])

RUN_CELLS = """
import json, sys
with open(sys.argv[1]) as file:
    cells = json.load(file)["cells"]
namespace = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
loaded = {name.partition(".")[0] for name in sys.modules}
assert not loaded & {"torch", "megatron"}, "the notebook has loaded torch or megatron"
"""


def write_run(run_dir: Path, **remix: Any) -> None:
    """A run of three boundaries, as training leaves its ledger and its banks."""
    decider = Decider(
        RemixConfig(**remix),
        seed=7,
        task_weights=dict.fromkeys(TASKS, 1.0),
        samples_per_epoch={"web": 900, "code": 300, "noise": 100},
    )
    ledger = Ledger(run_dir=run_dir)
    ledger.append(StageRow.first(Mixture.uniform(DOMAINS).rounded()))
    rng = np.random.default_rng(0)
    for stage in range(1, 4):
        at = Boundary(
            stage=stage,
            iteration=10 * stage,
            prior=ledger[-1].mixture,
            consumed=dict.fromkeys(DOMAINS, 10 * stage),
            interval_samples=30,
            ledger=ledger,
        )
        values_DBV = BENEFIT_DV[:, None, :] + 0.05 * rng.normal(size=(3, 8, 2))
        bank = SubBatchBank(64.0 * values_DBV, np.full((3, 8), 64.0), DOMAINS, TASKS)
        ledger.append(decider.decide(bank, at).row(at))


def execute(notebook: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run the code cells of a notebook in order, in an interpreter of their own."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"TIKMIX_RUN_DIR": str(run_dir), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", RUN_CELLS, str(notebook)],
        cwd=notebook.parent,
        env={**os.environ, **environment, "COLUMNS": "200", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


PAPER = {"preset": "paper", "constraints": ConstraintsConfig(max_total_variation=0.3)}


@pytest.mark.parametrize(
    "remix", [{}, PAPER, {"mode": "advise"}], ids=["default", "paper", "advise"]
)
def test_a_run_is_decided_again_in_the_notebook(remix: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path, **remix)
    result = execute(DECIDE_AGAIN, tmp_path)
    assert result.returncode == 0, result.stderr
    for told in ("is decided as it was", "gamma × 4", "gain of programs", "the change, their sum"):
        assert told in result.stdout


def test_the_notebook_notices_another_mixture(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / LEDGER
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
        row["weights"] = {"web": 0.5, "code": 0.25, "noise": 0.25}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = execute(DECIDE_AGAIN, tmp_path)
    assert result.returncode != 0
    assert "AssertionError: another mixture" in result.stderr


def test_the_notebook_says_where_no_run_is(tmp_path: Path) -> None:
    result = execute(DECIDE_AGAIN, tmp_path)
    assert result.returncode != 0
    assert f"{tmp_path} holds no ledger; run `make quickstart`" in result.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_stored_without_outputs(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    cells = content["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell["metadata"] == {}
        assert "".join(cell["source"]).strip()
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
