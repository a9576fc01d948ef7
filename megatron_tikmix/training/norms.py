"""Norms of plain torch that know sequence parallelism, in place of megatron-core's own.

megatron-core's WrappedTorchNorm, the norm where neither Transformer Engine nor Apex is, refuses
sequence parallelism for want of one mark on its parameters.
"""

from dataclasses import fields
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tikmix.errors import InputError

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """torch's LayerNorm or RMSNorm, as megatron-core's layer specs make a norm.

    Under sequence parallelism each tensor-parallel rank normalises a part of the sequence, so its
    gradient of the norm's parameters is a part of theirs: the mark `sequence_parallel` has
    megatron-core sum them.

    Raises:
        InputError: `config` asks for a norm, or a trait of one, that torch has not.
    """

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        for name in (
            "layernorm_zero_centered_gamma",
            "persist_layer_norm",
            "memory_efficient_layer_norm",
        ):
            if getattr(config, name):
                raise InputError(f"model.{name} needs Transformer Engine or Apex; leave it false")
        if config.normalization not in _NORMS:
            raise InputError(
                f"model.normalization {config.normalization} is not there without Transformer "
                f"Engine or Apex; use {' or '.join(_NORMS)}"
            )
        norm: torch.nn.Module = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def with_torch_norm(spec: Any) -> Any:
    """A copy of a layer spec, or a part of one: a TorchNorm where it has a WrappedTorchNorm."""
    if spec is WrappedTorchNorm:
        return TorchNorm
    if isinstance(spec, ModuleSpec):
        return ModuleSpec(
            module=with_torch_norm(spec.module),
            params=spec.params,
            submodules=with_torch_norm(spec.submodules),
        )
    if type(spec).__name__.endswith("Submodules"):  # megatron-core's dataclasses of specs
        values = {field.name: with_torch_norm(getattr(spec, field.name)) for field in fields(spec)}
        return type(spec)(**values)
    return spec
