"""What differs between the versions of megatron-core that setup.py allows, in one place."""

import inspect
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

__all__ = ["CheckpointException", "options_of_an_asynchronous_save", "writes_of_one_rank"]


def writes_of_one_rank() -> list[tuple[Any, str]]:
    """What writes files of a checkpoint on rank 0 alone: (owner, name) of each function.

    0.16 writes what is no tensor into `common.pt` by a strategy; later versions write it with the
    tensors, on every rank.
    """
    places: list[tuple[Any, str]] = [
        (FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ]
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is not None:
        places.insert(0, (strategy, "save_common"))
    return places


def options_of_an_asynchronous_save() -> dict[str, Any]:
    """For `dist_checkpointing.save`, so that it takes megatron-core's own writer.

    From 0.17 on it would take that of nvidia-resiliency-ext, which need not be installed.
    """
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}
