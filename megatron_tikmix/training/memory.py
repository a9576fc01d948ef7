"""How much memory this process has needed."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most that tensors on `device` have held at once; without a GPU, that this process has.

    Since the process began, or `torch.cuda.reset_peak_memory_stats` was called.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
