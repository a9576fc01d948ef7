"""What the package says through :mod:`logging`: with the rank in front, and only what matters.

Modules use ``logging.getLogger(__name__)``. What a run tells its user by design (plan, tables,
progress) is :mod:`megatron_tikmix.monitoring.terminal`'s; this is for what may go unseen.
"""

import logging
import os
import sys
import time
import warnings

PACKAGE = "megatron_tikmix"


class _StandardError(logging.Handler):
    """Writes to what `sys.stderr` is at that moment: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging() -> None:
    """Send the package's records and Python's warnings to standard error, rank first.

    Rank 0 tells from INFO on; the others, who would only repeat it, from ERROR on. The level of
    rank 0 is `MEGATRON_TIKMIX_LOG_LEVEL`, if that is set. Notes of megatron-core and torch on
    optional packages are dropped.
    """
    rank = _rank()
    handler = _StandardError()
    handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(name)s: %(message)s"))
    level = os.environ.get("MEGATRON_TIKMIX_LOG_LEVEL", "INFO").upper()
    known = logging.getLevelNamesMapping()
    for name in (PACKAGE, "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(known.get(level, logging.INFO) if rank == 0 else logging.ERROR)
    logging.captureWarnings(True)
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")


def tell_error(sentence: str) -> None:
    """Say why this program ends, once: ``error: ...`` on standard error.

    torchrun ends the job when its first rank exits, so other ranks leave rank 0 the time to
    speak. Who is still there afterwards is alone with the error, and says it.
    """
    if _rank() != 0:
        time.sleep(10)
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))
