"""The parts of benchmarks/influence.py, one file each."""

import megatron_tikmix  # noqa: F401 - before megatron.core, which it makes work without CUDA
