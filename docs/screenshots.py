"""Take the pictures of TensorBoard and of report.html that the documentation shows.

    python docs/screenshots.py [--run RUN_DIR --baseline RUN_DIR] [--output docs/pictures]

Needs Chromium. The run of six domains is RUN_DIR (`make quickstart` leaves one); that of 200 is
made up, its numbers drawn at random. Without --run both are.
"""

import argparse
import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tikmix.monitoring.report import write_report  # noqa: E402
from megatron_tikmix.monitoring.tensorboard import TensorBoardWriter  # noqa: E402
from tests.browser import find_browser, visit  # noqa: E402
from tests.make_run import INTERVAL, SEQUENCE_LENGTH, make_run, many_domains, realised, row_of  # noqa: E402

LARGEST = 150_000
"""Bytes of a picture, at most: fewer colours until it is as small."""

FILTER = "mixture/(weight|eff|total)"
TENSORBOARD = {
    "series": f"?darkMode=false&smoothing=0&forceSVG=true&tagFilter={FILTER}#timeseries",
    "images": "?darkMode=false#images",
    "custom": "?darkMode=false#custom_scalars&_smoothingWeight=0",
}
REPORT = (1200, 3600)
WINDOWS = {"series": (1400, 1150), "images": (1400, 900), "custom": (1400, 1700)}


def made_up(folder: Path, domains: int, seed: int = 0) -> Path:
    """A run of random numbers, with its event files."""
    names, shares = many_domains(domains)
    tasks = [f"task_{number}" for number in range(4 if domains < 20 else 9)]
    ledger, metrics = make_run(folder, names, tasks, 6, seed, shares, max_epochs=4.0)
    with TensorBoardWriter(folder / "tensorboard", sequence_length=SEQUENCE_LENGTH) as writer:
        writer.hparams(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        for former, stage in zip([None, *ledger], ledger, strict=False):
            writer.stage(row_of(stage), former and row_of(former))
            start = stage["start_iteration"]
            for row in metrics:
                if start < row["iteration"] <= start + INTERVAL:
                    writer.step(row, realised(ledger, row))
    return folder


@contextlib.contextmanager
def tensorboard(log_dir: Path) -> Iterator[str]:
    """A TensorBoard that shows `log_dir`; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_dir), "--host"]
    command += ["127.0.0.1", "--port", str(port), "--load_fast", "false"]
    address = f"http://127.0.0.1:{port}/"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}data/runs").close()  # noqa: S310
                break
            time.sleep(0.5)
        time.sleep(3)  # it has the run; now all of its events
        yield address
    finally:
        server.terminate()
        server.wait()


def take(address: str, size: tuple[int, int], path: Path, work: Path) -> None:
    """A picture of the page, small enough."""
    shot = work / "shot.png"
    visit(address, work / "profile", size=size, screenshot=shot, milliseconds=120_000)
    image = Image.open(shot).convert("RGB")
    for colours in (256, 128, 64, 32, 16):
        image.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a run of about six domains (default: made up)")
    parser.add_argument("--baseline", type=Path, help="a run to hold that one's losses against")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pictures")
    arguments = parser.parse_args()
    if find_browser() is None:
        print("error: there is no Chromium or Chrome on the PATH", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        few = work / "quickstart"
        if arguments.run:
            shutil.copytree(arguments.run, few, ignore=shutil.ignore_patterns("checkpoints"))
        else:
            made_up(few, 6)
        many = made_up(work / "made-up", 200)
        baselines = {few: arguments.baseline, many: made_up(work / "other", 200, seed=1)}
        for domains, run in ((6, few), (200, many)):
            report = write_report(run, baselines[run])
            path = arguments.output / f"report_{domains}.png"
            take(report.as_uri(), REPORT, path, work)
            with tensorboard(run / "tensorboard") as address:
                for name, place in TENSORBOARD.items():
                    path = arguments.output / f"tensorboard_{name}_{domains}.png"
                    take(address + place, WINDOWS[name], path, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
