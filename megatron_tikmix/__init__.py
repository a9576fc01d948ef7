"""Megatron-Core pretraining whose domain mixture follows the model (TiKMiX)."""

from megatron_tikmix.megatron.cpu import install as _install

__version__ = "0.1.0"


_install()
del _install
