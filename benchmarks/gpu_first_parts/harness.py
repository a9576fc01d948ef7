"""Runs the pieces one after the other, each in a process of its own. Standard library only.

A piece is a module of this folder with ``measure(notes, device, work, **arguments)``. What it notes
is kept step by step, so one that is cut short goes on where it was, and one that fails stops no
other.
"""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_first_parts.notes import Figures, write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
SHORTEST = 20.0
"""Seconds; with less left of a call no further piece is begun."""

FINISHED = ("done", "skipped", "failed")


class RunError(Exception):
    """A call that cannot be followed; the message says why, and what helps."""


@dataclass(frozen=True)
class Piece:
    """One process's worth of figures.

    Attributes:
        asks: what it finds out.
        module: with the function ``measure``.
        seconds: its limit, at most nine minutes.
        arguments: further ones of ``measure``.
    """

    name: str
    asks: str
    module: str
    seconds: float
    arguments: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """Folders: of the report, and of what a second call goes on from and packages lie in."""

    output: Path
    work: Path

    @property
    def site(self) -> Path:
        return self.work / "site"

    @property
    def report(self) -> Path:
        return self.output / "gpu_first.json"

    @property
    def state(self) -> Path:
        return self.work / "gpu_first.json"

    def notes(self, name: str) -> Path:
        return self.work / "notes" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.log"


def run(
    pieces: Sequence[Piece],
    places: Places,
    *,
    device: str,
    named: Sequence[str] = (),
    failed: bool = False,
    minutes: float = 9.0,
    say: Callable[[str], None] = print,
) -> Figures:
    """Run the pieces that are left, or those named, anew; the report.

    The report is written after each piece. It is gone on from as `places` has it.

    Args:
        device: `cuda` or `cpu`.
        failed: those that have failed are left, too; they go on from the steps that they ended.
        minutes: of the whole call. A piece that it cuts short goes on in the next one.

    Raises:
        RunError: an unknown piece, or a report of another device.
    """
    known = {piece.name: piece for piece in pieces}
    for name in named:
        if name not in known:
            raise RunError(f"there is no piece {name}; there are {', '.join(known)}")
    report = earlier(places, device)
    found: Figures = report["pieces"]
    finished = set(FINISHED) - ({"failed"} if failed else set())
    chosen = [known[name] for name in named] or [
        piece for piece in pieces if found.get(piece.name, {}).get("state") not in finished
    ]
    ends = time.monotonic() + 60 * minutes
    for number, piece in enumerate(chosen):
        left = ends - time.monotonic()
        if left < SHORTEST:
            names = ", ".join(each.name for each in chosen[number:])
            say(f"no time is left in this call; the next one goes on with {names}")
            break
        notes = places.notes(piece.name)
        if piece.name in named:
            notes.unlink(missing_ok=True)
        elif not notes.is_file() and piece.name in found:
            write_json(notes, {"steps": found[piece.name]["steps"]})
        say(f"{piece.name}: {piece.asks} …")
        entry = run_piece(piece, places, device, left)
        found[piece.name] = entry
        report["machine"] |= entry.pop("machine", {})
        publish(report, pieces, places)
        say(f"{piece.name}: {verdict(entry)} ({entry['seconds']:.0f} s)")
    publish(report, pieces, places)
    return report


def earlier(places: Places, device: str) -> Figures:
    """The report that is gone on with, or an empty one.

    Raises:
        RunError: it cannot be read, or is of another device.
    """
    for path in (places.report, places.state):
        if not path.is_file():
            continue
        try:
            report: Figures = json.loads(path.read_text(encoding="utf-8"))
            of = report["device"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is no report of gpu_first; move it away") from error
        if of != device:
            raise RunError(f"{path} is a report of DEVICE={of}; give another --output")
        return report
    return {"device": device, "machine": {}, "pieces": {}}


def run_piece(piece: Piece, places: Places, device: str, left: float) -> Figures:
    """One piece, in a process of its own; its entry in the report."""
    notes, log = places.notes(piece.name), places.log(piece.name)
    log.parent.mkdir(parents=True, exist_ok=True)
    steps_before = len(_read(notes)["steps"])
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py"), "piece", piece.module]
    command += [device, str(notes), str(places.work), json.dumps(dict(piece.arguments))]
    limit = min(piece.seconds, left)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment(device, places),
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    content = _read(notes)
    entry: Figures = {
        "state": "done",
        "seconds": time.monotonic() - started,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "card": content.get("machine", {}).get("card"),
        "steps": content["steps"],
        "machine": content.get("machine", {}),
    }
    if code is None:
        cut = limit < piece.seconds or len(content["steps"]) > steps_before
        entry["state"] = "unfinished" if cut else "failed"
        entry["problem"] = f"was stopped after {limit:.0f} s"
    elif "skipped" in content:
        entry |= {"state": "skipped", "problem": content["skipped"]}
    elif code:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        entry["state"] = "failed"
        entry["problem"] = content.get("error") or f"exit code {code}: {' '.join(last)}"
    return entry


def environment(device: str, places: Places) -> dict[str, str]:
    """That of a piece."""
    folders = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    values = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*filter(None, folders), str(places.site)]),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1" if device == "cpu" else "4"),
    }
    if device == "cpu":
        values["CUDA_VISIBLE_DEVICES"] = ""
    else:
        values.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        values.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return values


def verdict(entry: Figures) -> str:
    """One sentence on a piece."""
    if entry["state"] != "done":
        return f"{entry['state']}: {entry['problem']}"
    judged = {name: step["kept"] for name, step in entry["steps"].items()}
    broken = [name for name, kept in judged.items() if kept is False]
    if broken:
        return f"not as promised: {', '.join(broken)}"
    return "as promised" if any(judged.values()) else "measured"


def troubles(report: Figures) -> list[str]:
    """The pieces that failed, or found a promise broken."""
    return [
        f"{name}: {verdict(entry)}"
        for name, entry in report["pieces"].items()
        if entry["state"] == "failed" or verdict(entry).startswith("not as promised")
    ]


def publish(report: Figures, pieces: Sequence[Piece], places: Places) -> None:
    """Write the report as JSON and Markdown, and one archive of the logs beside it."""
    write_json(places.state, report)
    write_json(places.report, report)
    write_text(places.output / "gpu_first.md", markdown(report, pieces))
    archive = places.output / "gpu_first_logs.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for log in sorted(places.log("*").parent.glob("*.log")):
            tar.add(log, arcname=log.name)


def markdown(report: Figures, pieces: Sequence[Piece]) -> str:
    """The report to be read."""
    machine: Figures = report["machine"]
    card = machine.get("card") or "no GPU: a rehearsal, whose figures say nothing of one"
    lines = [f"# First run: {card}", ""]
    lines += [f"- {name}: {shown(value)}" for name, value in machine.items() if name != "card"]
    lines += ["", "| piece | asks | verdict | seconds |", "|---|---|---|--:|"]
    found = report["pieces"]
    for piece in pieces:
        entry = found.get(piece.name)
        said = f"{verdict(entry)} | {entry['seconds']:.0f}" if entry else "not run yet | "
        lines.append(f"| `{piece.name}` | {piece.asks} | {_cell(said)} |")
    for piece in pieces:
        entry = found.get(piece.name)
        if not entry or not entry["steps"]:
            continue
        lines += ["", f"## `{piece.name}`", "", f"{entry['date']}, {entry['card'] or 'no GPU'}", ""]
        for name, step in entry["steps"].items():
            mark = {True: "as promised: ", False: "NOT AS PROMISED: ", None: ""}[step["kept"]]
            figures = "; ".join(f"{key} {shown(value)}" for key, value in step["figures"].items())
            lines.append(f"- **{name}**: {mark}{figures}")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A figure as it is read: 12,345, 0.995, 2.5e-08, yes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    return "–" if value is None else str(value)


def driver() -> str | None:
    """The NVIDIA driver's version, if nvidia-smi tells it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(asked, capture_output=True, text=True)
    return result.stdout.splitlines()[0].strip() if result.stdout else None


def has_card() -> bool:
    """Whether there is an NVIDIA card, as far as can be told without torch."""
    return driver() is not None or any(Path("/dev").glob("nvidia[0-9]*"))


def host() -> str:
    """Processors and Python."""
    return f"{os.cpu_count()} cores, Python {platform.python_version()}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a piece and all that it started, which share its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _read(path: Path) -> Figures:
    content: Figures = {"steps": {}}
    if path.is_file():
        content |= json.loads(path.read_text(encoding="utf-8"))
    return content


def _cell(text: str) -> str:
    """Without line breaks; bars stand for columns only where they are the table's own."""
    said, _, seconds = text.rpartition(" | ")
    return f"{' '.join(said.split()).replace('|', '/')} | {seconds}"
