"""``python -m megatron_tikmix`` on a disk that is full while some checkpoints are saved.

Iteration 4: for the tensors of rank 1. 6 and 10: for what rank 0 writes first, and last.
"""

import errno
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from megatron_tikmix.__main__ import main
from megatron_tikmix.megatron.faults import writes_of_one_rank

RANK = int(os.environ["RANK"])


def failing(write: Callable[..., None], rank: int, folder: str) -> Callable[..., None]:
    def write_or_fail(*arguments: Any, **options: Any) -> None:
        place = f"{arguments} {getattr(arguments[0], 'checkpoint_dir', '')}"
        if rank == RANK and folder in place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments, **options)

    return write_or_fail


def full_for_tensors() -> None:
    """In the writers' own processes, where megatron-core opens its files."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    former = filesystem_async._write_item  # type: ignore[attr-defined]

    @functools.wraps(former)  # megatron-core looks at its signature
    def write_item(*arguments: Any, **options: Any) -> Any:
        stream = next(value for value in arguments if hasattr(value, "fileno"))
        if RANK == 1 and "iter_0000004" in stream.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return former(*arguments, **options)

    filesystem_async._write_item = write_item  # type: ignore[attr-defined]


full_for_tensors()
FULL_FOR = {"save_common": "iter_0000006", "finish": "iter_0000010"}
for owner, name in writes_of_one_rank():
    if name in FULL_FOR:
        setattr(owner, name, failing(getattr(owner, name), 0, FULL_FOR[name]))

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
