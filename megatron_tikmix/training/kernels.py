"""Which implementations of Adam, norm and attention a run is made of, in words."""

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from megatron_tikmix.training.optimizer_state import distributed_optimizers

# The longest that fits is taken. megatron-core's wrappers are told by what they wrap.
_PACKAGES = {
    "torch": "torch",
    "apex": "Apex",
    "transformer_engine": "Transformer Engine",
    "megatron.core": "megatron-core",
    "megatron.core.fusions.fused_layer_norm": "Apex",
    "megatron.core.extensions.transformer_engine": "Transformer Engine",
}


def kernels_in_use(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> str:
    """Of this rank's chunks and its optimizer, as they were built."""
    modules = [module for chunk in unwrap_model(model) for module in chunk.modules()]
    adam = [part.optimizer for part in distributed_optimizers(optimizer)]
    parts = {
        "optimizer": _named(adam),
        # A layer norm may be part of the linear layer behind it (TELayerNormColumnParallelLinear).
        "norm": _named(module for module in modules if "Norm" in type(module).__name__),
        "attention": _named(module.core_attention for module in modules if _attends(module)),
    }
    return "; ".join(f"{part} {names or 'none on this rank'}" for part, names in parts.items())


def _attends(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "core_attention", None), torch.nn.Module)


def _named(objects: Iterable[object]) -> str:
    """`torch AdamW`, or several of them, each once."""
    return ", ".join(sorted({_name(type(thing)) for thing in objects}))


def _name(kind: type) -> str:
    fitting = [name for name in _PACKAGES if f"{kind.__module__}.".startswith(f"{name}.")]
    package = _PACKAGES[max(fitting, key=len)] if fitting else kind.__module__.split(".")[0]
    return f"{package} {kind.__name__}"
