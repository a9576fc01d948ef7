"""This package's own collectives. Every rank of the group must call each of them."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.megatron.groups import Parallel

Made = TypeVar("Made")


def barrier(parallel: Parallel) -> None:
    """Wait for every rank."""
    dist.barrier(group=parallel.cpu_group)


def sum_over_ranks(values: torch.Tensor, parallel: Parallel) -> torch.Tensor:
    """Return the sum of `values` (any shape) over all ranks, in float64 on the CPU."""
    total = values.detach().to("cpu", torch.float64, copy=True)
    dist.all_reduce(total, group=parallel.cpu_group)
    return total


def max_over_ranks(value: float, parallel: Parallel) -> float:
    """Return the largest `value` of any rank."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parallel.cpu_group)
    return largest.item()


def gather_slices(buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Fill the flat `buffer`, in which each rank of the group holds its own equal slice."""
    own_slice = buffer.chunk(group.size())[group.rank()]
    dist.all_gather_into_tensor(buffer, own_slice, group=group)


def broadcast_integers(values: np.ndarray, parallel: Parallel) -> np.ndarray:
    """Return rank 0's int64 `values` on every rank; the others pass an array of the same shape.

    They wait as long as a decision may take, `decision_timeout_minutes`.
    """
    tensor = torch.from_numpy(values.astype(np.int64))
    with _waiting_for_decision():
        dist.broadcast(tensor, src=0, group=parallel.decision_group)
    return tensor.numpy()


def broadcast_object(value: Any, parallel: Parallel) -> Any:
    """Return rank 0's `value` on every rank; they wait as in :func:`broadcast_integers`."""
    box = [value]
    with _waiting_for_decision():
        dist.broadcast_object_list(box, src=0, group=parallel.decision_group)
    return box[0]


@contextmanager
def _waiting_for_decision() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            f"rank 0 is gone, or has not decided within decision_timeout_minutes; raise that if "
            f"deciding may take longer ({' '.join(str(error).split())[:200]})"
        ) from error


def agree_on_input(error: InputError | None, parallel: Parallel) -> None:
    """Raise the same input error on every rank, the first rank's, if any rank has one."""
    found: list[str | None] = [None] * parallel.world_size
    dist.all_gather_object(found, None if error is None else str(error), group=parallel.cpu_group)
    for message in found:
        if message is not None:
            raise InputError(message)


def make_on_all_ranks(
    parallel: Parallel, make: Callable[[], Made], refusals: tuple[type[Exception], ...] = ()
) -> Made:
    """Return `make()`, or raise the same InputError on every rank if any rank fails. Collective.

    Args:
        refusals: further exceptions that count as input errors.

    Raises:
        InputError: that of the first rank that failed.
    """
    made: list[Made] = []
    problem = None
    try:
        made.append(make())
    except InputError as error:
        problem = error
    except refusals as error:
        text = " ".join(str(error).split()) or type(error).__name__
        problem = InputError(f"megatron-core refuses the configuration: {text}")
    agree_on_input(problem, parallel)
    return made[0]


def first_problem(problem: str | None, parallel: Parallel) -> str | None:
    """Return on every rank the first rank's `problem`, naming the rank; None if none has one."""
    if sum_over_ranks(torch.tensor([problem is not None]), parallel).item() == 0:
        return None
    found: list[str | None] = [None] * parallel.world_size
    dist.all_gather_object(found, problem, group=parallel.cpu_group)
    rank, text = next((rank, text) for rank, text in enumerate(found) if text is not None)
    return f"rank {rank}: {text}" if parallel.world_size > 1 else text


def gather_objects(value: Any, parallel: Parallel) -> list[Any]:
    """Return every rank's `value`, by rank, on every rank."""
    found: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(found, value, group=parallel.cpu_group)
    return found


# Words in the errors of gloo and NCCL when other ranks are late or gone.
_LEFT_ALONE = ("timed out", "timeout", "connection closed", "connection reset", "broken pipe")


def left_alone(error: RuntimeError, place: str, parallel: Parallel) -> TrainingError | None:
    """Return an error that names the missing ranks if they made a collective fail, else None.

    A rank is missing if it does not answer within 10 s.

    Args:
        place: the activity of this rank, in words.
    """
    text = " ".join(str(error).split())
    if not any(words in text.lower() for words in _LEFT_ALONE):
        return None
    missing = "another rank"
    try:
        # This group has no unfinished collective. Rank 0 learns which ranks are missing.
        dist.monitored_barrier(
            parallel.decision_group, timeout=timedelta(seconds=10), wait_all_ranks=True
        )
    except RuntimeError as failure:
        found = re.search(r"[Rr]anks? ([0-9][0-9, ]*) failed to (?:pass|reach)", str(failure))
        if found is not None:
            missing = f"rank {found.group(1).strip(' ,')}"
        elif not parallel.is_main:
            missing = "rank 0"
    return TrainingError(
        f"rank {parallel.rank} got no answer during {place}: {missing} is stuck or gone; see what "
        f"it says, and start again to resume from the newest checkpoint ({text[:200]})"
    )


class MeetingPoint:
    """Lets a rank find out whether it alone has failed. Making one is collective.

    It needs a process group with a short timeout: in other groups collectives wait for
    `timeout_minutes`, and a rank cannot even exit while one of its collectives waits.

    Args:
        seconds: how long ranks wait for each other.
    """

    def __init__(self, seconds: float) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))

    def all_arrive(self) -> bool:
        """Return whether every rank calls this in time. Unlike a collective, some may miss it.

        After False the ranks are out of step: this rank must exit, so that the launcher ends the
        others.
        """
        try:
            dist.all_reduce(torch.zeros(1), group=self._group)
        except RuntimeError:
            return False
        return True


def check_same_on_all_ranks(digest: str, what: str, parallel: Parallel) -> None:
    """Stop the job if `digest` differs between ranks.

    Args:
        what: the object of which it is the digest, for the message.

    Raises:
        TrainingError: on every rank, naming the ranks that differ from rank 0.
    """
    own_digest = int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "big", signed=True)
    digests = [torch.zeros(1, dtype=torch.int64) for _ in range(parallel.world_size)]
    dist.all_gather(digests, torch.tensor([own_digest]), group=parallel.cpu_group)
    different = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if different:
        ranks = ("rank " if len(different) == 1 else "ranks ") + ", ".join(map(str, different))
        raise TrainingError(
            f"{what} of {ranks} differs from that of rank 0; see that all of them run the same "
            f"code, configuration and data, and start again to resume from the newest checkpoint"
        )
