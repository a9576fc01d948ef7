"""Megatron-Core pretraining whose domain mixture follows the model (TiKMiX)."""

__version__ = "0.1.0"

from megatron_tikmix.parallel.cpu import install as _install

_install()
del _install
