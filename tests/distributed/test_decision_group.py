"""Rank 0 may take its time to decide; and ranks that part ways are told apart."""

import time

import numpy as np
import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_tikmix.errors import TrainingError
from megatron_tikmix.megatron.collectives import (
    broadcast_integers,
    broadcast_object,
    check_same_on_all_ranks,
)
from megatron_tikmix.megatron.groups import Parallel
from tests.ranks import RanksFailed, run_on_ranks

TIMEOUT_SECONDS = 8
DECISION_TIMEOUT_SECONDS = 25


def decide(solve_seconds: float) -> str:
    """Take decisions that last so long; how this rank is told that it has parted from the other."""
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
    with pytest.raises(TrainingError) as told:
        check_same_on_all_ranks(str(parallel.rank), "the mixture schedule", parallel)
    return str(told.value)


def test_a_slow_solve_trips_no_timeout_but_its_own() -> None:
    slow = TIMEOUT_SECONDS + 2
    assert slow < DECISION_TIMEOUT_SECONDS
    words = (
        "the mixture schedule of rank 1 differs from that of rank 0; see that all of them run "
        "the same code"
    )
    told = run_on_ranks(decide, 2, slow)
    assert len(told) == 2
    assert all(sentence.startswith(words) for sentence in told)


def test_a_solve_that_never_ends_is_given_up() -> None:
    with pytest.raises(RanksFailed) as raised:
        run_on_ranks(decide, 2, DECISION_TIMEOUT_SECONDS + 60)
    _, told = str(raised.value).split("rank 1: Traceback")
    assert (
        "TrainingError: rank 0 is gone, or has not decided within decision_timeout_minutes" in told
    )
