"""Commands and tools are programs: tests run them as a user would."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.conftest import ROOT

TOOLS = ROOT / "tools"
sys.path.insert(0, str(TOOLS))

Run = Callable[..., subprocess.CompletedProcess[str]]


def _run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="session")
def run_tool() -> Run:
    """Runs a file of tools/."""
    return lambda name, *arguments, **options: _run(TOOLS / name, *arguments, **options)


@pytest.fixture(scope="session")
def run_command() -> Run:
    """Runs ``tikmix``."""
    return lambda *arguments, **options: _run("-m", "megatron_tikmix.cli", *arguments, **options)
