"""benchmarks/gpu_first.py: pieces that fail or are cut short, the report, and what it packs."""

import json
import os
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from gpu_first_parts import harness, wheels
from gpu_first_parts.harness import Piece, Places, RunError

ROOT = Path(__file__).parents[3]

TOYS = {
    "good": "notes.add('sum', {'value': 0.5}, kept=True)",
    "broken": "notes.add('before', {'value': 1})\n    raise RuntimeError('no such card')",
    "killed": "import os; os._exit(9)",
    "wrong": "notes.add('bits', {'the same': False}, kept=False)",
    "absent": "raise Skipped('there is no such attention here')",
    "endless": "notes.add('first', {}) if 'first' not in notes else None\n    time.sleep(600)",
    "stuck": "time.sleep(600)",
    "two": "for step in ('one', 'two'):\n"
    "        if step not in notes:\n"
    "            notes.add(step, {'asked': asked})\n"
    "            (work / 'done').open('a').write(step)",
}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """Folders, with pieces made by hand where a piece's process finds them."""
    for name, body in TOYS.items():
        (tmp_path / f"toy_{name}.py").write_text(
            "import time\nfrom gpu_first_parts.notes import Skipped\n"
            f"def measure(notes, device, work, asked=''):\n    {body}\n"
        )
    # As a namespace beside the real package: `gpu_first_parts.toy_good`.
    monkeypatch.setattr(
        harness, "environment", lambda *_: {**os.environ, "TOYS": str(tmp_path)}, raising=True
    )
    site = tmp_path / "sitecustomize.py"
    site.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        "import gpu_first_parts\n"
        "gpu_first_parts.__path__.append(os.environ['TOYS'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Places(tmp_path / "out", tmp_path / "work")


def toy(name: str, seconds: float = 60, **arguments: str) -> Piece:
    return Piece(name, f"what {name} finds", f"toy_{name}", seconds, arguments)


def run(places: Places, *pieces: Piece, **options: Any) -> dict[str, Any]:
    said: list[str] = []
    report = harness.run(pieces, places, device="cpu", say=said.append, **options)
    assert json.loads(places.report.read_text()) == report
    return {"said": said, **report["pieces"]}


def test_a_piece_that_fails_is_reported_and_the_next_ones_run(places: Places) -> None:
    pieces = [toy(name) for name in ("broken", "killed", "wrong", "absent", "good")]
    found = run(places, *pieces)
    assert {name: entry["state"] for name, entry in found.items() if name != "said"} == {
        "broken": "failed",
        "killed": "failed",
        "wrong": "done",
        "absent": "skipped",
        "good": "done",
    }
    assert "no such card" in found["broken"]["problem"]
    assert found["broken"]["steps"]["before"]["figures"] == {"value": 1}
    assert "exit code 9" in found["killed"]["problem"]
    assert harness.verdict(found["wrong"]) == "not as promised: bits"
    assert harness.verdict(found["absent"]) == "skipped: there is no such attention here"
    text = (places.output / "gpu_first.md").read_text()
    assert "| `broken` | what broken finds | failed: RuntimeError: no such card |" in text
    assert "| `good` | what good finds | as promised |" in text
    assert "- **bits**: NOT AS PROMISED: the same no" in text
    report = json.loads(places.report.read_text())
    assert len(harness.troubles(report)) == 3
    assert (places.output / "gpu_first_logs.tar.gz").is_file()


def test_a_second_call_runs_what_is_left_and_a_named_piece_anew(places: Places) -> None:
    pieces = [toy("broken"), toy("two", asked="before"), toy("good")]
    run(places, *pieces, named=("broken", "two"))
    later = run(places, *pieces)
    assert [line.split(":")[0] for line in later["said"]] == ["good", "good"]
    assert (places.work / "done").read_text() == "onetwo"
    again = run(places, toy("two", asked="again"), named=("two",))
    assert (places.work / "done").read_text() == "onetwoonetwo"
    assert again["two"]["steps"]["one"]["figures"] == {"asked": "again"}
    assert again["good"]["state"] == "done"
    assert [line.split(":")[0] for line in run(places, *pieces, failed=True)["said"]] == [
        "broken"
    ] * 2


def test_a_piece_that_is_cut_short_goes_on_where_it_was(places: Places) -> None:
    endless, stuck = toy("endless", seconds=2), toy("stuck", seconds=1)
    found = run(places, endless, stuck)
    assert found["endless"]["state"] == "unfinished"
    assert found["endless"]["steps"] == {"first": {"figures": {}, "kept": None}}
    # A piece that found nothing in all its time has failed: it would take that long for ever.
    assert found["stuck"]["state"] == "failed"
    # The report alone is enough, on another machine.
    for path in (places.state, places.notes("endless")):
        path.unlink()
    report = json.loads(places.report.read_text())
    report["pieces"]["two"] = report["pieces"].pop("endless")
    report["pieces"]["two"]["steps"] = {"one": {"figures": {}, "kept": None}}
    places.report.write_text(json.dumps(report))
    assert run(places, toy("two"))["two"]["state"] == "done"
    assert (places.work / "done").read_text() == "two"


def test_no_piece_is_begun_without_time(places: Places) -> None:
    said: list[str] = []
    report = harness.run([toy("good")], places, device="cpu", minutes=0.1, say=said.append)
    assert report["pieces"] == {}
    assert said == ["no time is left in this call; the next one goes on with good"]


def test_calls_that_cannot_be_followed_are_refused(places: Places) -> None:
    with pytest.raises(RunError, match="there is no piece gold; there are good"):
        run(places, toy("good"), named=("gold",))
    run(places, toy("good"))
    with pytest.raises(RunError, match="is a report of DEVICE=cpu; give another --output"):
        harness.run([toy("good")], places, device="cuda")
    places.report.write_text("[]")
    with pytest.raises(RunError, match="is no report of gpu_first; move it away"):
        run(places, toy("good"))


def test_wheels_are_pinned_and_their_size_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = wheels.pinned(also=["scipy"], leave_out=["Tensorboard"])
    assert pins[0] == wheels.MEGATRON
    assert all("==" in pin for pin in pins)
    assert any(pin.startswith("scipy==") for pin in pins)
    assert not any(pin.startswith("tensorboard==") for pin in pins)
    with pytest.raises(wheels.PackError, match=r"scypy is not in constraints\.txt"):
        wheels.pinned(also=["scypy"])
    (tmp_path / "large-1.0-py3-none-any.whl").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(wheels, "_tracked_bytes", lambda: 2**19)
    expected = "1 wheels of 3.0 MiB and the checkout of 0.5 MiB are 3.5 MiB of 64 MiB"
    assert wheels.fits(tmp_path) == expected
    with pytest.raises(wheels.PackError, match=r"of 2 MiB: too much; --leave-out .*large 3\.0 MiB"):
        wheels.fits(tmp_path, limit_mib=2)


def test_what_setup_requires_is_carried_or_expected_there() -> None:
    setup = (ROOT / "setup.py").read_text()
    required = setup[setup.index("install_requires") : setup.index("extras_require")]
    names = {wheels._name(name) for name in re.findall(r'^ *"([\w-]+)>=', required, re.MULTILINE)}
    carried = {wheels._name(pin.partition("=")[0]) for pin in wheels.pinned()}
    assert names - carried == {"torch", "numpy", "scipy"}


def test_a_wait_for_the_card_is_counted_at_its_place() -> None:
    from gpu_first_parts.host_waits import counted

    def wait() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    # As if this line were one of the package.
    there = {"__name__": "megatron_tikmix.place", "warnings": warnings}
    of_package = types.FunctionType(wait.__code__, there)
    with counted() as found:
        for call in (of_package, of_package, wait):
            call()
        warnings.warn("of no concern", stacklevel=1)
    line = wait.__code__.co_firstlineno + 1
    assert found == {f"megatron_tikmix.place:{line}": 2, "elsewhere": 1}


def rehearse(tmp_path: Path, *names: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "OUT"}
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu_first.sh", "--work", tmp_path, *names],
        env=environment | {"DEVICE": device, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )


def test_pieces_are_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "versions", "snapshot")
    assert result.returncode == 3, result.stdout + result.stderr  # some pieces are left
    report = json.loads((tmp_path / "report" / "gpu_first.json").read_text())
    entries = report["pieces"]
    assert {name: harness.verdict(entry) for name, entry in entries.items()} == {
        "versions": "as promised",
        "snapshot": "as promised",
    }
    assert report["machine"]["card"] is None
    assert rehearse(tmp_path, device="tpu").returncode == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_piece_is_rehearsed_without_a_gpu(tmp_path: Path) -> None:
    result = rehearse(tmp_path, "--minutes", "18")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((tmp_path / "report" / "gpu_first.json").read_text())
    states = {name: entry["state"] for name, entry in report["pieces"].items()}
    assert states.pop("tests") == "skipped"
    states.pop("350m-sdpa")  # done where the configuration has that attention
    assert len(states) == 9
    assert set(states.values()) == {"done"}
