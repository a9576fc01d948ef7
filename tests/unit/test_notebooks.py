"""The notebooks run as they stand, cell by cell, on a run whose stages were really decided."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.decided_run import run

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_torch(path: Path, tmp_path: Path) -> None:
    run(tmp_path, stages=2)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code), "stored without outputs"
    program = "\n".join("".join(cell["source"]) for cell in code)
    program += "\nimport sys\nassert not {'torch', 'megatron'} & set(sys.modules)\n"
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "TIKMIX_RUN_DIR": str(tmp_path)},
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "the largest difference of a weight: 0.0\n" in found.stdout
    assert "counts ten times" in found.stdout
