"""run_on_ranks itself: answers, failures, and the call after a failure."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import overridden, read_rows, without_timings
from tests.ranks import RanksFailed, launch, run_on_ranks, torchrun, train


def place(offset: int) -> tuple[int, int, int]:
    """This rank's number, the sum over ranks, and its process."""
    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.getpid()


def raising(rank: int) -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        raise ArithmeticError(f"on rank {rank} alone")
    dist.barrier()


def dying(rank: int) -> None:
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def sleeping() -> None:
    time.sleep(600)


def test_results_come_in_the_order_of_ranks_from_processes_that_stay() -> None:
    first = run_on_ranks(place, 2, 10)
    assert [result[:2] for result in first] == [(0, 21), (1, 21)]
    second = run_on_ranks(place, 3, 0)
    assert [result[:2] for result in second] == [(0, 3), (1, 3), (2, 3)]
    assert [result[2] for result in second[:2]] == [result[2] for result in first]
    assert run_on_ranks(place, 1, 4)[0][:2] == (0, 4)


def test_failures_are_told_by_rank_and_the_next_call_works() -> None:
    with pytest.raises(RanksFailed) as raised:
        run_on_ranks(raising, 2, 1)
    ours, theirs = str(raised.value).split("rank 1: Traceback")
    assert ours.startswith("rank 0: ")
    assert "in raising" in ours, "where it was waiting"
    assert "in raising" in theirs
    assert "ArithmeticError: on rank 1 alone" in theirs
    with pytest.raises(RanksFailed, match=r"(?s)^rank 0: died with exit code -9.*rank 1: was"):
        run_on_ranks(dying, 2, 0)
    assert [result[:2] for result in run_on_ranks(place, 2, 10)] == [(0, 21), (1, 21)]
    with pytest.raises(RanksFailed, match=r"(?s)^rank 0: did not end in 1 s.*in sleeping"):
        run_on_ranks(sleeping, 1, timeout=1)


def test_no_process_outlives_the_test_that_started_it() -> None:
    code = "from tests.distributed.test_ranks import *\nprint(run_on_ranks(place, 1, 0)[0][2])"
    result = torchrun(["-c", code])
    assert result.returncode == 0, result.stderr
    assert not Path(f"/proc/{result.stdout.strip()}").exists()


def test_a_process_that_stays_trains_as_a_new_one_does(settings: dict[str, Any]) -> None:
    """The same bits, dropout on, after a run of another layout in the same processes."""
    dropout = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
    other = overridden(
        settings,
        {"run_dir": f"{settings['run_dir']}-other", "model.pipeline_model_parallel_size": 2},
    )
    train(other, ranks=2)
    runs = []
    for number, run in enumerate((train, launch)):
        mine = overridden(settings, {**dropout, "run_dir": f"{settings['run_dir']}-{number}"})
        result = run(mine, ranks=2)
        assert "stage 1, after iteration 4" in result.stderr
        runs.append(mine["run_dir"])
    for name in ("metrics.jsonl", "mixture.jsonl"):
        ours, theirs = (without_timings(read_rows(run, name)) for run in runs)
        assert ours == theirs
