"""Logging: the package's records on standard error, with the rank in front.

Modules use ``logging.getLogger(__name__)``. The regular output of a run (plan, tables, progress) is
printed by :mod:`megatron_tikmix.monitoring.terminal`; logging is for everything else.
"""

import logging
import os
import sys
import time
import warnings

PACKAGE = "megatron_tikmix"


class _StandardError(logging.Handler):
    """Writes to the current `sys.stderr`, which a progress bar may have replaced."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def configure_logging() -> None:
    """Send the package's records and Python's warnings to standard error, rank first.

    The level is INFO on rank 0, or `MEGATRON_TIKMIX_LOG_LEVEL` if that is set, and ERROR on the
    others, which would only repeat it. Warnings of megatron-core and torch are dropped.
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


def print_error(sentence: str) -> None:
    """Print ``error: ...`` on standard error, on one rank if all ranks call this.

    torchrun ends the job when its first rank exits, so other ranks wait for rank 0 to print it. A
    rank that still runs after that is the only one with the error, and prints it.
    """
    if _rank() != 0:
        time.sleep(10)
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))
