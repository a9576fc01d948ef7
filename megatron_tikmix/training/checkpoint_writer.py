"""megatron-core's `dist_checkpointing.save`, with a full disk reported on every rank.

megatron-core informs every rank when a writer of tensors fails, but not when rank 0 fails to write
a file of its own (`common.pt`, `.metadata`, `metadata.json`): the other ranks then wait for it.
Here those failures are collected, and reported on all ranks together with the writers'.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import TemporalAsyncCaller

from megatron_tikmix.megatron.collectives import first_problem
from megatron_tikmix.megatron.faults import (
    CheckpointException,
    options_of_an_asynchronous_save,
    results_past_sigterm,
    results_without_a_process,
    writes_of_one_rank,
)
from megatron_tikmix.megatron.groups import Parallel


class ShardSaving:
    """A save of a checkpoint's shards, which making one starts. All methods are collective.

    Args:
        in_background: a forked process writes the present state while training goes on.
    """

    def __init__(
        self, sharded_state: dict[str, Any], path: Path, parallel: Parallel, *, in_background: bool
    ) -> None:
        self._parallel = parallel
        self._problems: list[str] = []
        self._caller = TemporalAsyncCaller()
        results = results_past_sigterm() if in_background else results_without_a_process()
        with _noted(self._problems), results:
            request = dist_checkpointing.save(
                sharded_state,
                str(path),
                async_sharded_save=True,
                **options_of_an_asynchronous_save(),
            )
        assert request is not None
        self._finalize = request.finalize_fns
        try:
            if in_background:
                self._caller.schedule_async_call(request._replace(finalize_fns=[]))
            elif request.async_fn is not None:
                arguments = list(request.async_fn_args)
                if request.preload_fn is not None:
                    arguments[1] = request.preload_fn()
                request.async_fn(*arguments, **request.async_fn_kwargs)
        except OSError as error:  # no memory for a writer's process, say
            self._problems.append(str(error))

    def written(self) -> bool:
        """Return whether this rank's writer has ended, so that :meth:`finish` need not wait."""
        return bool(self._caller.is_current_async_call_done(blocking=False, no_dist=True))

    def finish(self) -> str | None:
        """Wait for the writers, and write the metadata.

        Returns:
            None, or why the checkpoint is incomplete (a full disk, say); the same on every rank.
        """
        self._caller.is_current_async_call_done(blocking=True, no_dist=True)
        # Even after a failure: the next save must not find this one's results.
        with _noted(self._problems):
            try:
                for finalize in self._finalize:
                    finalize()
            except CheckpointException as error:  # raised on every rank; rank 0 knows the cause
                self._problems.append(_first_failure(error))
        return self._agreed()

    def _agreed(self) -> str | None:
        return first_problem(self._problems[0] if self._problems else None, self._parallel)


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Catch failures of the files that rank 0 writes alone, and add them to `problems`."""

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def noted(*arguments: Any, **options: Any) -> None:
            try:
                write(*arguments, **options)
            except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for OSError
                problems.append(str(error))

        return noted

    places = writes_of_one_rank()
    former = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, write in former:
        setattr(place, name, noting(write))
    try:
        yield
    finally:
        for place, name, write in former:
            setattr(place, name, write)


def _first_failure(error: CheckpointException) -> str:
    """Return the failed writer's message; a general one on ranks that do not have it."""
    for rank, (failure, _) in sorted(error.failures.items()):
        return f"{failure} (written by rank {rank})"
    return "its writing failed on another rank"
