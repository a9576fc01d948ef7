"""Saved at each of four layouts, loaded at each: the same samples, and losses within 1e-5."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_every_layout_goes_on_from_every_other(tmp_path: Path) -> None:
    figures = tmp_path / "matrix.json"
    result = subprocess.run(
        [sys.executable, "benchmarks/resume_matrix.py", "--json", str(figures)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    cells = json.loads(figures.read_text())["cells"]
    assert len(cells) == 16
    for cell in cells:
        assert cell["same_samples"], cell
        assert cell["difference"] < 1e-5, cell
