"""Ending a run before its last iteration, so that it can go on later: signals, time, iterations."""

import logging
import os
import signal
import socket
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from megatron_tikmix.config import TrainConfig

_log = logging.getLogger(__name__)

SAME_SIGNAL_SECONDS = 2.0
"""A signal this soon after the first one is not counted as a second: Ctrl-C and `scancel` reach
this process both directly and through torchrun."""

_OUT_OF_TIME = 1
_HANDLED = (signal.SIGTERM, signal.SIGINT)


class SignalWatch:
    """Context manager that notes SIGTERM and SIGINT; a second signal ends this process at once.

    It listens in a thread, since the main thread may be inside a collective, which no Python
    handler interrupts. Entered outside Python's main thread it has no effect.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._former: dict[int, Any] = {}

    @property
    def received(self) -> int | None:
        """The number of the first signal, or None."""
        return self._received

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._former_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _nothing) for number in _HANDLED}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._former:
            return
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def _listen(self) -> None:
        first = 0.0
        while numbers := self._reader.recv(1):
            number = numbers[0]
            if number not in _HANDLED:
                continue
            if self._received is None:
                self._received, first = number, time.monotonic()
                _log.info(
                    "%s: the run ends after this step, with a checkpoint; a second signal ends "
                    "it at once",
                    signal.Signals(number).name,
                )
            elif time.monotonic() - first > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)


class Stopping:
    """Decides after every step, the same on every rank, whether the run ends early.

    Each rank sends its signal and time to the others during a step, on the device (`say` of
    :func:`~megatron_tikmix.megatron.step.train_step`): a later signal ends the run a step later.

    Args:
        signals: None: signals are not watched.
        started: `time.monotonic()` at the start of the run, for `exit_duration_in_mins`.
    """

    def __init__(
        self,
        config: TrainConfig,
        signals: SignalWatch | None = None,
        started: float | None = None,
    ) -> None:
        self._interval = config.exit_interval
        self._minutes = config.exit_duration_in_mins
        self._started = time.monotonic() if started is None else started
        self._signals = signals

    def reason(self, iteration: int, code: int) -> str | None:
        """Return why the run ends after `iteration`, or None if it goes on.

        Args:
            code: the largest :meth:`code` of any rank.
        """
        if code > _OUT_OF_TIME:
            return signal.Signals(code).name
        if code == _OUT_OF_TIME:
            return f"train.exit_duration_in_mins ({self._minutes:g})"
        if self._interval is not None and iteration % self._interval == 0:
            return f"train.exit_interval ({self._interval})"
        return None

    def code(self) -> int:
        """Return this rank's reason as a number: a signal's, `_OUT_OF_TIME`, or 0 for none."""
        if self._signals is not None and self._signals.received is not None:
            return self._signals.received
        passed = (time.monotonic() - self._started) / 60
        return _OUT_OF_TIME if self._minutes is not None and passed > self._minutes else 0


def _nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread handles the signal. Forked workers inherit this handler."""
