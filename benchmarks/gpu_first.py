"""The first run on a GPU: what a machine with one card tells in pieces of at most nine minutes.

  pack   downloads the wheels that a machine without network lacks into .wheels, and checks their
         size; take that folder along with the checkout
  run    runs the pieces below, in this order, or those named. A second call goes on where the
         first stopped; a piece that failed is run again with --failed, or when it is named

The report is gpu_first.json and gpu_first.md in --output, with an archive of the logs. With
DEVICE=cpu every piece is rehearsed without a GPU, small and on gloo: that shows that the pieces
work, and its figures say nothing.
"""

import argparse
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from gpu_first_parts import harness, wheels
from gpu_first_parts.harness import Piece, Places, RunError
from gpu_first_parts.notes import Notes, Skipped
from gpu_first_parts.wheels import PackError

PIECES = (
    Piece("versions", "does it import, and with what", "versions", 90),
    Piece("tests", "tests/gpu", "gpu_tests", 540),
    Piece(
        "350m-sdpa",
        "350 M in bf16, torch's attention: speed beside a plain loop, memory beside the plan",
        "speed",
        180,
        {"model": "350m", "attention": "sdpa"},
    ),
    Piece(
        "350m-selective",
        "the same with megatron-core's attention, which is recomputed",
        "speed",
        180,
        {"model": "350m", "recompute": "selective"},
    ),
    Piece("bits", "the same bits: twice, with a probe, resumed", "bits", 480),
    Piece("snapshot", "are rollouts undone to the bit", "snapshot", 120),
    Piece("host-waits", "where the host waits for the card", "host_waits", 120),
    Piece("pair", "two ranks on one card: sharded and replicated against one", "pair", 300),
    Piece(
        "350m-full",
        "350 M, every layer recomputed: what a probe needs on top",
        "speed",
        180,
        {"model": "350m", "recompute": "full"},
    ),
    Piece(
        "350m-local",
        "350 M with megatron-core's attention, nothing recomputed",
        "speed",
        180,
        {"model": "350m"},
    ),
    Piece("1b", "1 B, the model of examples/1b.yaml", "speed", 300, {"model": "1b"}),
)


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "pack":
            print(wheels.pack(options.also, options.leave_out))
            return 0
        return run(options)
    except (PackError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    """Run pieces; 0 if all are done, 1 if one failed or broke a promise, 3 if some are left.

    Raises:
        RunError: DEVICE is neither cuda nor cpu, or see :func:`harness.run`.
        PackError: something is missing.
    """
    device = os.environ.get("DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        raise RunError(f"DEVICE is {device}; it must be cuda or cpu")
    if device == "cuda" and not harness.has_card():
        raise RunError("there is no NVIDIA GPU here; DEVICE=cpu rehearses every piece without one")
    work = options.work or Path("runs/benchmarks/gpu_first") / device
    output = options.output or Path(os.environ.get("OUT") or work / "report")
    places = Places(output.resolve(), work.resolve())
    if missing := wheels.install_missing(places.site):
        print(f"installed for these pieces alone: {', '.join(missing)}", flush=True)
    # Ends the piece that is running, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    report = harness.run(
        PIECES,
        places,
        device=device,
        named=options.pieces,
        failed=options.failed,
        minutes=options.minutes,
        say=lambda text: print(text, flush=True),
    )
    print(f"the report is {places.output / 'gpu_first.md'}")
    if found := harness.troubles(report):
        print("\n".join(found), file=sys.stderr)
        return 1
    entries = report["pieces"]
    return 0 if all(entries.get(p.name, {}).get("state") in harness.FINISHED for p in PIECES) else 3


def piece(module: str, device: str, notes_file: str, work: str, given: str) -> int:
    """One piece, in this process; what became of it is in the notes."""
    notes = Notes(Path(notes_file))
    notes.save()
    try:
        measure = importlib.import_module(f"gpu_first_parts.{module}").measure
        measure(notes, device, Path(work), **json.loads(given))
    except Skipped as reason:
        notes.content["skipped"] = str(reason)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        notes.content["error"] = f"{type(error).__name__}: {text[:300]}"
        return 1
    finally:
        notes.save()
    return 0


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {each.name:<16} {each.asks}" for each in PIECES)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\npieces:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="download wheels", allow_abbrev=False)
    packing.add_argument(
        "--also", nargs="+", default=[], metavar="NAME", help=f"besides (not: {wheels.AT_HOME})"
    )
    packing.add_argument("--leave-out", nargs="+", default=[], metavar="NAME", help="leave out")
    running = commands.add_parser("run", help="run pieces", allow_abbrev=False)
    running.add_argument("pieces", nargs="*", metavar="PIECE", help="all that are left, if none")
    running.add_argument("--failed", action="store_true", help="those that failed, too")
    running.add_argument(
        "--output", type=Path, metavar="DIR", help="of the report (default: $OUT, or in --work)"
    )
    running.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        help="data and runs (default: runs/benchmarks/gpu_first/DEVICE)",
    )
    running.add_argument(
        "--minutes", type=float, default=9.0, help="of this call (default 9); the rest is left"
    )
    return parser


if __name__ == "__main__":
    if sys.argv[1:2] == ["piece"]:
        sys.exit(piece(*sys.argv[2:]))
    sys.exit(main(sys.argv[1:]))
