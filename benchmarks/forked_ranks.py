"""Ranks of a job as forks of a process that has imported everything: started in no time."""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    """A port for MASTER_PORT that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def fork_rank(rank: int, ranks: int, port: int, log: Path, train: Callable[[], None]) -> int:
    """Run `train` as one of `ranks` in a forked process; its id.

    What it prints is appended to `log`. Its exit code is 1 if `train` raised, else 0.
    """
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {name: str(value) for name, value in of_rank.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        train()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
