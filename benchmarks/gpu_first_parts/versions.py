"""What is here: the card, the versions, and that megatron-core is as it was published."""

import importlib
import subprocess
from pathlib import Path
from typing import Any

from gpu_first_parts import harness, runs
from gpu_first_parts.notes import Notes

# isort: split
import megatron.core
import torch
from megatron.core.tensor_parallel import random

from megatron_tikmix.config import GPTConfig  # noqa: F401  (that jsonargparse is there)
from megatron_tikmix.training.plan import matrix_product_rate

PACKAGES = (
    *("numpy", "scipy", "lightgbm", "clarabel", "plotly", "jsonargparse", "tensorboard"),
    *("tokenizers", "triton", "transformer_engine", "apex", "flash_attn"),
)


def measure(notes: Notes, device: str, work: Path) -> None:
    note_machine(notes, device)
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "there")
        except ImportError:
            found[name] = "not there"
    notes.add("packages", found)
    loader = type(random.__spec__.loader).__name__ if random.__spec__ else "unknown"
    published = loader == "SourceFileLoader"
    notes.add(
        "megatron-core",
        {"version": megatron.core.__version__, "loaded by": loader},
        # Without CUDA it is rewritten as it is loaded, and there it must not be.
        kept=published == (device == "cuda"),
    )
    sizes = (1024, 8192) if device == "cuda" else (256,)
    rates = {str(size): matrix_product_rate(torch.bfloat16, size) / 1e12 for size in sizes}
    notes.add("bf16 matrix product, TFLOP/s by its size", rates)


def note_machine(notes: Notes, device: str) -> None:
    """Put the machine at the head of the report.

    Raises:
        RuntimeError: torch sees no GPU, and one is asked for.
    """
    on_gpu = torch.cuda.is_available()
    if device == "cuda" and not on_gpu:
        raise RuntimeError(f"torch {torch.__version__} sees no GPU here; DEVICE=cpu rehearses")
    notes.content["machine"] = {
        "card": torch.cuda.get_device_name() if on_gpu else None,
        "memory, GiB": torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None,
        "driver": harness.driver() if on_gpu else None,
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "megatron-core": megatron.core.__version__,
        "host": harness.host(),
        "commit": _commit(),
    }
    notes.save()


def _commit() -> str | None:
    asked = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(asked, cwd=runs.ROOT, capture_output=True, text=True)
    return result.stdout.strip() or None
