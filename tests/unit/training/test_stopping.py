"""Signals while the main thread hears nothing, and what counts as a second one."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from megatron_tikmix.config import TrainConfig
from megatron_tikmix.training import stopping
from megatron_tikmix.training.stopping import SignalWatch, Stopping


def two_signals(apart: float) -> None:
    """In a process of its own; the main thread waits for a lock, deaf to Python handlers."""
    stopping.SAME_SIGNAL_SECONDS = 0.3
    with SignalWatch() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(apart)
        os.kill(os.getpid(), signal.SIGINT)
        lock = threading.Lock()
        lock.acquire()
        lock.acquire(timeout=2.0)
        os._exit(0 if signals.received == signal.SIGTERM else 1)


@pytest.mark.parametrize(("apart", "code"), [(0.0, 0), (0.6, 128 + signal.SIGINT)])
def test_a_second_signal_ends_the_process_at_once(apart: float, code: int) -> None:
    process = multiprocessing.get_context("fork").Process(target=two_signals, args=(apart,))
    process.start()
    process.join(30)
    assert process.exitcode == code


def test_handlers_are_put_back() -> None:
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with SignalWatch() as signals:
        assert signals.received is None
        assert signal.getsignal(signal.SIGTERM) is not former[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == former


def test_time_and_iterations_end_a_run() -> None:
    config = TrainConfig(train_iters=20, exit_interval=7, exit_duration_in_mins=2.0)
    in_time = Stopping(config, started=time.monotonic() - 100)
    late = Stopping(config, started=time.monotonic() - 130)
    assert in_time.reason(6, in_time.code()) is None
    assert in_time.reason(14, in_time.code()) == "train.exit_interval (7)"
    assert late.reason(6, late.code()) == "train.exit_duration_in_mins (2)"
