"""The place of this process in the job that launched it."""

import os


def launched_world() -> tuple[int, int, int]:
    """(rank, local rank, world size), from the variables torchrun sets; 0, 0, 1 without it."""
    read = os.environ.get
    return int(read("RANK", 0)), int(read("LOCAL_RANK", 0)), int(read("WORLD_SIZE", 1))
