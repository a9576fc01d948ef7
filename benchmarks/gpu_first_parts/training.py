"""One rank of training: ``python -m gpu_first_parts.training CONFIG.yaml [--deterministic]``."""

import os
import sys

if __name__ == "__main__":
    path, *flags = sys.argv[1:]
    if flags:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as torch asks for, before CUDA starts
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
    from megatron_tikmix.__main__ import main

    sys.exit(main([path]))
