"""Functions and training runs on several ranks: in a pool of processes, or in jobs of their own.

:func:`run_on_ranks` calls a function of a test on every rank. Its processes stay for the next call,
since importing torch and megatron-core takes each of them seconds. :func:`train` gives them whole
training runs. :func:`launch` starts a training run as users do, through torchrun, for tests of
signals, exit codes and processes that die; :func:`torchrun` does so with any program.
"""

import atexit
import faulthandler
import importlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import ROOT, forget_attention_backend, let_go_of_models

GRACE_SECONDS = 5.0
"""How long the other ranks have to end once one has failed."""
KEPT = 4
"""Processes that stay for the next call; those of more ranks are ended."""

# A function that returns a context manager, and its arguments: what a training run is wrapped in.
Change = tuple[Callable[..., AbstractContextManager[Any]], *tuple[Any, ...]]


class RanksFailed(Exception):
    """A rank raised, died or did not end in time; the message has a paragraph for each that did."""


@dataclass(frozen=True)
class Outcome:
    """What a function returned on one rank, and what that process and its children printed."""

    value: Any
    stdout: str
    stderr: str


def run_on_ranks(
    function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 300.0
) -> list[Any]:
    """Call ``function(*arguments)`` on so many ranks; return what each rank returned, in order.

    The environment is that of torchrun, so that :func:`megatron_tikmix.megatron.groups.initialize`
    connects the ranks, once in a call. Whatever is left of megatron-core and of process groups
    is cleared before the next call.

    Args:
        function: of a module, importable by its name; arguments and results are pickled.
        timeout: seconds.

    Raises:
        RanksFailed: a rank raised, died or did not end in time. All processes are killed; the next
            call starts others.
    """
    return [outcome.value for outcome in _outcomes(function, ranks, arguments, timeout)]


def train(
    settings: dict[str, Any], ranks: int = 1, check: bool = True, change: Change | None = None
) -> subprocess.CompletedProcess[str]:
    """Train as :func:`launch` does, in the processes of :func:`run_on_ranks`."""
    config = _written(settings)
    outcomes = _outcomes(train_within, ranks, (change, str(config)), 300.0)
    return _checked(
        subprocess.CompletedProcess(
            ["megatron_tikmix", str(config)],
            max(outcome.value for outcome in outcomes),
            "".join(outcome.stdout for outcome in outcomes),
            "".join(outcome.stderr for outcome in outcomes),
        ),
        check,
    )


def launch(
    settings: dict[str, Any],
    ranks: int = 1,
    check: bool = True,
    change: Change | None = None,
    max_restarts: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m megatron_tikmix`` on `ranks` processes, through torchrun if more than one.

    Args:
        check: fail the test if the exit code is not 0.
        change: a function and its arguments, as JSON has them; it is called on every rank, and
            training runs inside the context manager that it returns.
    """
    program = ["megatron_tikmix"]
    if change is not None:
        function, *arguments = change
        name = f"{function.__module__}:{function.__qualname__}"
        program = ["tests.ranks", name, json.dumps(arguments)]
    command = ["-m", *program, str(_written(settings))]
    return _checked(torchrun(command, ranks, max_restarts=max_restarts), check)


def torchrun(
    command: list[str], ranks: int = 1, *, max_restarts: int = 0, timeout: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run ``python *command``, through torchrun on more than one rank."""
    forget_attention_backend()
    python_path = filter(None, [os.environ.get("PYTHONPATH")])
    options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}"]
    return subprocess.run(
        [
            sys.executable,
            *(["-m", "torch.distributed.run", *options] if ranks > 1 else []),
            *command,
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *python_path])},
    )


def train_within(change: Change | None, config: str) -> int:
    """The exit code of the command line on this rank, run inside a change."""
    from megatron_tikmix.__main__ import main

    function, *arguments = (nullcontext,) if change is None else change
    with function(*arguments):
        return main([config])


def _written(settings: dict[str, Any]) -> Path:
    """The configuration file of these settings, beside the run's folder."""
    run_dir = Path(settings["run_dir"])
    config = run_dir.with_name(f"{run_dir.name}.yaml")
    config.write_text(yaml.safe_dump(settings))
    return config


def _checked(
    result: subprocess.CompletedProcess[str], check: bool
) -> subprocess.CompletedProcess[str]:
    if check and result.returncode != 0:
        pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result


class _Process:
    """A process of the pool, as the test's own process sees it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="rank-")
        self.output = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        for file in self.output:
            file.touch()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.output))
        self.process.start()
        theirs.close()

    def send(self, request: bytes) -> None:
        for file in self.output:
            os.truncate(file, 0)
        self.connection.send_bytes(request)

    def printed(self) -> list[str]:
        return [file.read_text(errors="replace") for file in self.output]

    def kill(self) -> None:
        """End it and what it has started."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not come to lead a group of its own
                self.process.kill()
        self.process.join()
        self.connection.close()
        self.folder.cleanup()


_pool: list[_Process] = []


def _outcomes(
    function: Callable[..., Any], ranks: int, arguments: tuple[Any, ...], timeout: float
) -> list[Outcome]:
    request = pickle.dumps((function, arguments))
    try:
        while len(_pool) < ranks:
            _pool.append(_Process())
        outcomes = _ask(_pool[:ranks], request, timeout)
    except BaseException:  # an interrupt, or pytest's own timeout, too
        _kill(0)
        raise
    _kill(KEPT)
    return outcomes


def _kill(kept: int) -> None:
    """End the processes of the pool but for the first ones."""
    while len(_pool) > kept:
        _pool.pop().kill()


atexit.register(_kill, 0)


def _ask(processes: list[_Process], request: bytes, timeout: float) -> list[Outcome]:
    """Have each process answer, and wait for the answers.

    Raises:
        RanksFailed: as in :func:`run_on_ranks`.
    """
    # The launcher's own, as torchrun has it: a new one for each call, on a port that is free.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        "WORLD_SIZE": str(len(processes)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for rank, process in enumerate(processes):
        forget_attention_backend()
        environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process.send(pickle.dumps((environment, request)))
    values: dict[int, Any] = {}
    problems: dict[int, str] = {}
    waiting = dict(enumerate(processes))
    deadline = time.monotonic() + timeout
    while waiting and time.monotonic() < deadline:
        # Not their sentinels: children that they have forked keep those open.
        wait([process.connection for process in waiting.values()], 0.2)
        for rank, process in list(waiting.items()):
            gone = not process.process.is_alive()
            if process.connection.poll():
                try:
                    succeeded, answer = process.connection.recv()
                    (values if succeeded else problems)[rank] = answer
                except EOFError:
                    process.process.join(GRACE_SECONDS)
                    problems[rank] = _death(process)
            elif gone:
                problems[rank] = _death(process)
            else:
                continue
            del waiting[rank]
            if rank in problems:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for process in waiting.values():
        os.kill(process.process.pid, signal.SIGUSR1)  # it prints where it is
    if waiting:
        time.sleep(0.5)
        why = "was still waiting for the others" if problems else f"did not end in {timeout:g} s"
        problems |= dict.fromkeys(waiting, why)
    printed = [process.printed() for process in processes]
    if problems:
        raise RanksFailed(
            "\n".join(
                f"rank {rank}: {problems[rank]}\n{''.join(printed[rank])}"
                for rank in sorted(problems)
            )
        )
    return [Outcome(values[rank], *printed[rank]) for rank in range(len(processes))]


def _death(process: _Process) -> str:
    return f"died with exit code {process.process.exitcode}"


def _serve(connection: Connection, output: list[Path]) -> None:
    """Answer calls until the test process is gone: a process of the pool."""
    os.setpgid(0, 0)
    for number, (stream, file) in enumerate(zip((sys.stdout, sys.stderr), output, strict=True), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
        stream.reconfigure(encoding="utf-8", line_buffering=True)
    faulthandler.register(signal.SIGUSR1, file=2)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    while True:
        environment, request = pickle.loads(connection.recv_bytes())
        try:
            _start_afresh()
            os.environ.clear()
            os.environ.update(environment)
            function, arguments = pickle.loads(request)
            answer = True, function(*arguments)
            pickle.dumps(answer)
        except BaseException:
            answer = False, traceback.format_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(answer)


def _start_afresh() -> None:
    """Clear what the last call has left in this process, once all ranks have ended it."""
    import megatron_tikmix  # noqa: F401  (first: megatron.core needs it where there is no CUDA)

    # isort: split
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    initialize_rng_tracker(force_reset=True)
    torch.manual_seed(67280421310721)  # that of a new process
    let_go_of_models()


if __name__ == "__main__":
    _module, _, _name = sys.argv[1].partition(":")
    _change = getattr(importlib.import_module(_module), _name)
    sys.exit(train_within((_change, *json.loads(sys.argv[2])), sys.argv[3]))
