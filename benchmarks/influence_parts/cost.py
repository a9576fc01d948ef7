"""What something needs on top of what is there: time, and peak resident memory."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Seconds by the clock and of the processor, which a busy machine does not change as much, and
    bytes above the resident memory at the start (None: not on Linux)."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int | None = None


@contextmanager
def cost() -> Iterator[Cost]:
    """Fill in the cost of the block when it ends."""
    measured = Cost()
    gc.collect()
    before = _reset_peak()
    started, busy = time.perf_counter(), time.process_time()
    yield measured
    measured.seconds = time.perf_counter() - started
    measured.cpu_seconds = time.process_time() - busy
    if before is not None:
        measured.peak_bytes = _read("VmHWM") - before


def _reset_peak() -> int | None:
    """Resident bytes now, from where the high-water mark starts again."""
    try:
        _CLEAR.write_text("5")
        return _read("VmRSS")
    except OSError:
        return None


def _read(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
