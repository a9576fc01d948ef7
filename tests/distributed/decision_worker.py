"""Run by torchrun, two ranks: a decision that takes longer than a collective may.

torchrun --nproc-per-node 2 tests/distributed/decision_worker.py SOLVE_SECONDS
"""

import os
import sys
import time

import megatron_tikmix  # noqa: F401  (first: megatron.core needs it where there is no CUDA)

# isort: split
import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_tikmix.errors import TrainingError
from megatron_tikmix.megatron.collectives import (
    broadcast_integers,
    broadcast_object,
    check_same_on_all_ranks,
)
from megatron_tikmix.megatron.groups import Parallel

TIMEOUT_SECONDS = 10
DECISION_TIMEOUT_SECONDS = 40


def main(solve_seconds: float) -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    parallel = Parallel.from_megatron(
        timeout_minutes=TIMEOUT_SECONDS / 60,
        decision_timeout_minutes=DECISION_TIMEOUT_SECONDS / 60,
    )
    dist.barrier()
    if parallel.is_main:
        time.sleep(solve_seconds)
    weights = broadcast_integers(np.array([3, 4]) * parallel.is_main, parallel)
    assert weights.tolist() == [3, 4]
    dist.barrier()
    if parallel.is_main:
        time.sleep(solve_seconds)
    assert broadcast_object("main" if parallel.is_main else None, parallel) == "main"
    dist.barrier()
    try:
        check_same_on_all_ranks(str(parallel.rank), "the mixture schedule", parallel)
    except TrainingError as error:
        print(f"rank {parallel.rank}: {error}", flush=True)
        time.sleep(3)  # who leaves at once may take the connection from who is not told yet


if __name__ == "__main__":
    try:
        main(float(sys.argv[1]))
    except TrainingError as error:
        print(f"rank {os.environ['RANK']}: {error}", flush=True)
        # At once: the other rank is still busy, and a group is not left without it.
        os._exit(3)
