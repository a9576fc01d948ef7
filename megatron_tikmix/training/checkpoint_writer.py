"""megatron-core's `dist_checkpointing.save`, such that no rank is left alone with a full disk.

megatron-core tells every rank when a writer of tensors fails. It does not where rank 0 writes
something by itself (`common.pt`, `.metadata`, `metadata.json`): the others then wait for it. Here
these failures are noted and told afterwards, with all the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tikmix.parallel.collectives import first_problem
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.parallel.megatron_versions import (
    options_of_an_asynchronous_save,
    writes_of_one_rank,
)


def save_shards(sharded_state: dict[str, Any], path: Path, parallel: Parallel) -> str | None:
    """Write this rank's part of a checkpoint. Collective.

    Returns:
        None; or, the same on every rank, why the checkpoint is not whole: the disk is full, say.
    """
    with _noted() as problems:
        request = dist_checkpointing.save(
            sharded_state,
            str(path),
            async_sharded_save=True,
            **options_of_an_asynchronous_save(),
        )
        assert request is not None
        arguments = list(request.async_fn_args)
        try:
            if request.async_fn is not None:
                if request.preload_fn is not None:
                    arguments[1] = request.preload_fn()
                request.async_fn(*arguments, **request.async_fn_kwargs)
        except OSError as error:  # no memory for a writer's process, say
            problems.append(str(error))
        problem = first_problem(problems[0] if problems else None, parallel)
        if problem is not None:
            return problem
        try:
            for finalize in request.finalize_fns:
                finalize()
        except CheckpointException as error:  # on every rank; rank 0 knows why
            problems.append(_first_failure(error))
    return first_problem(problems[0] if problems else None, parallel)


@contextmanager
def _noted() -> Iterator[list[str]]:
    """What rank 0 could not write by itself."""
    problems: list[str] = []

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any, **options: Any) -> None:
            try:
                write(*arguments, **options)
            except (OSError, RuntimeError) as error:  # torch.save makes RuntimeErrors of them
                problems.append(str(error))

        return noted

    places = writes_of_one_rank()
    former = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, write in former:
        setattr(place, name, noting(write))
    try:
        yield problems
    finally:
        for place, name, write in former:
            setattr(place, name, write)


def _first_failure(error: CheckpointException) -> str:
    """The writer's own message; empty on the ranks that were not told."""
    for rank, (failure, _) in sorted(error.failures.items()):
        return f"{failure} (written by rank {rank})"
    return "its writing failed on another rank"
