"""An `apex` that is not NVIDIA's is named; NVIDIA's is used, through megatron-core."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, that finds the packages in `folder` first."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


FOREIGN = {"apex/__init__.py": "print 'Python 2'"}  # as PyPI's, which cannot even be imported
NVIDIA = {
    "apex/__init__.py": "",
    "apex/optimizers/__init__.py": (
        "from apex.optimizers.fused_adam import FusedAdam\nclass FusedSGD: ...\n"
    ),
    "apex/optimizers/fused_adam.py": "class FusedAdam: ...\n",
    "apex/multi_tensor_apply.py": "multi_tensor_applier = None\n",
}
WITH_EXTENSIONS = {
    **NVIDIA,
    "amp_C.py": "multi_tensor_l2norm = multi_tensor_scale = multi_tensor_unscale_l2norm = None\n",
}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (FOREIGN, "is not NVIDIA's Apex (on PyPI that name belongs to an unrelated project)"),
        ({"apex/README.md": ""}, "is not NVIDIA's Apex"),  # a folder of that name: also importable
        (NVIDIA, "was built without its CUDA extensions"),
    ],
)
def test_what_megatron_cannot_use_is_refused_in_one_sentence(
    files: dict[str, str], words: str, tmp_path: Path
) -> None:
    write(tmp_path, files)
    result = run(tmp_path, "-m", "megatron_tikmix", "examples/quickstart.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert str(tmp_path / "apex") in result.stderr
    assert "Traceback" not in result.stderr


def test_nvidias_is_used(tmp_path: Path) -> None:
    write(tmp_path, WITH_EXTENSIONS)
    code = """
from megatron_tikmix.megatron.apex import check_apex
check_apex()
from megatron.core.optimizer import Adam
print(Adam.__module__, Adam.__name__)
"""
    result = run(tmp_path, "-c", code)
    assert result.stdout.split() == ["apex.optimizers.fused_adam", "FusedAdam"], result.stderr


def test_none_at_all_is_fine(tmp_path: Path) -> None:
    code = "from megatron_tikmix.megatron.apex import check_apex; check_apex()"
    assert run(tmp_path, "-c", code).returncode == 0
