"""tests/gpu, each test noted as it ends; those that passed are not run again."""

from pathlib import Path

import pytest

from gpu_first_parts import versions
from gpu_first_parts.notes import Figures, Notes, Skipped

ROOT = Path(__file__).resolve().parents[2]


class _Noting:
    """A plugin of pytest that leaves out tests that have passed, and notes how the others end."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        passed = [item for item in items if _passed(self._notes, item.nodeid)]
        items[:] = [item for item in items if item not in passed]
        config.hook.pytest_deselected(items=passed)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        figures: Figures = {"outcome": report.outcome, "seconds": report.duration}
        if report.failed:
            figures["error"] = _last_error(report.longreprtext)
        kept = None if report.skipped else report.passed
        self._notes.add(_short(report.nodeid), figures, kept=kept)


def measure(notes: Notes, device: str, work: Path) -> None:
    versions.note_machine(notes, device)
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", str(ROOT / "tests" / "gpu")]
    code = pytest.main(options, plugins=[_Noting(notes)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        if code == pytest.ExitCode.NO_TESTS_COLLECTED and notes.content["steps"]:
            return  # all have passed before
        raise RuntimeError(f"pytest ended with {code!r}; see the log")
    steps = notes.content["steps"].values()
    if all(step["kept"] is None for step in steps):
        raise Skipped(f"all {len(steps)} tests need a CUDA GPU and NCCL")


def _passed(notes: Notes, nodeid: str) -> bool:
    step = notes.content["steps"].get(_short(nodeid))
    return bool(step and step["kept"])


def _short(nodeid: str) -> str:
    return nodeid.rpartition("::")[2]


def _last_error(text: str) -> str:
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return (lines or text.strip().splitlines()[-1:] or [""])[0][:200]
