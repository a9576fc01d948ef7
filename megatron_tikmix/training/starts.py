"""What a run is started on, for `starts.jsonl`: versions, layout and device."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

import torch

import megatron_tikmix
from megatron_tikmix.config import RunConfig
from megatron_tikmix.parallel.initialize import Parallel

PACKAGES = ("megatron-core", "torch", "numpy", "scipy", "clarabel", "lightgbm", "tokenizers")
"""Those that figures may depend on."""


def start_row(config: RunConfig, parallel: Parallel, iteration: int) -> dict[str, Any]:
    """A row of `starts.jsonl`: the iteration that is started from, when, and on what."""
    device = parallel.device
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "iteration": iteration,
        "world_size": parallel.world_size,
        "layout": {
            "tensor": config.model.tensor_model_parallel_size,
            "pipeline": config.model.pipeline_model_parallel_size,
            "data": parallel.data_parallel_size,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "megatron_tikmix": megatron_tikmix.__version__,
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
