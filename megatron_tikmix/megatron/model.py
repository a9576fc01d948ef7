"""The model: megatron-core's GPTModel from a layer spec, wrapped for data parallelism."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from megatron_tikmix.config import GPTConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.attention import ScaledDotProductAttention
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.optimizer import distributed_optimizers
from megatron_tikmix.seeds import derived_seed


def padded_vocab_size(vocab_size: int, config: GPTConfig) -> int:
    """Vocabulary rounded up to make_vocab_size_divisible_by: the same for every layout."""
    multiple = config.make_vocab_size_divisible_by
    return math.ceil(vocab_size / multiple) * multiple


def layer_spec(config: GPTConfig) -> ModuleSpec:
    """Return the spec of the transformer layer that `config` asks for.

    Raises:
        InputError: Transformer Engine is asked for, and not installed.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if config.uses_transformer_engine:
        if not HAVE_TE:
            raise InputError(
                "model.transformer_impl transformer_engine: Transformer Engine cannot be imported "
                "here; install it, or use local, or auto, which takes it where it is"
            )
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    spec = with_torch_norm(
        get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    )
    if config.uses_torch_attention:
        spec.submodules.self_attention.submodules.core_attention = ScaledDotProductAttention
    return spec


def block_spec(
    config: GPTConfig, groups: ProcessGroupCollection, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return the spec of one pipeline stage: its layers, and the norm after the last."""
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp.rank())
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config)] * layers, layer_norm=with_torch_norm(LayerNormImpl)
    )


def build_model(
    config: GPTConfig,
    ddp_config: DistributedDataParallelConfig,
    *,
    vocab_size: int,
    sequence_length: int,
    seed: int,
    parallel: Parallel,
) -> list[DistributedDataParallel]:
    """Build this rank's model chunks: one, or one per virtual pipeline stage."""
    groups = parallel.groups
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages or 1):
        first = groups.pp.rank() == 0 and stage == 0
        last = groups.pp.rank() == groups.pp.size() - 1 and stage == (stages or 1) - 1
        chunk = GPTModel(
            config,
            block_spec(config, groups, stage if stages else None),
            vocab_size=padded_vocab_size(vocab_size, config),
            max_sequence_length=sequence_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=config.rotary_base,
            pg_collection=groups,
            vp_stage=stage if stages else None,
        )
        initialize_parameters(chunk, config, groups, seed)
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk = chunk.to(parallel.device)
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return [
        DistributedDataParallel(
            config,
            copy.copy(ddp_config),
            chunk,
            # Only the first stage's gradients come last, and gain from overlapping in buckets.
            disable_bucketing=index > 0,
            pg_collection=groups,
        )
        for index, chunk in enumerate(chunks)
    ]


@torch.no_grad()
def initialize_parameters(
    model: GPTModel, config: GPTConfig, groups: ProcessGroupCollection, seed: int
) -> None:
    """Draw every weight matrix again, so that all layouts start from the same model.

    megatron-core seeds each tensor- and pipeline-parallel rank on its own, so its initial
    parameters depend on the layout. Here each whole parameter is drawn from a seed made of
    its global name and layer, by megatron-core's own initialisation method, and each rank
    keeps its shard. Vectors (norms, biases) are constants already.
    """
    state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    apply_factories(state)
    for tensor in nested_values(state):
        if not isinstance(tensor, ShardedTensor) or len(tensor.local_shape) < 2:
            continue
        layer = tensor.global_offset[: tensor.prepend_axis_num]
        shape = tensor.global_shape[tensor.prepend_axis_num :]
        offset = tensor.global_offset[tensor.prepend_axis_num :]
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derived_seed(seed, tensor.key, *layer))
            whole = torch.empty(shape, dtype=torch.float32, device=tensor.data.device)
            _initialization(tensor.key, config)(whole)
        shard = tuple(
            slice(start, start + size)
            for start, size in zip(offset, tensor.local_shape, strict=True)
        )
        tensor.data.copy_(whole[shard])


def _initialization(key: str, config: GPTConfig) -> Callable[[torch.Tensor], object]:
    if "linear_proj." in key or "linear_fc2." in key:
        return config.output_layer_init_method
    return config.embedding_init_method if "embedding" in key else config.init_method


# In place of megatron-core's WrappedTorchNorm, its norm without Transformer Engine and Apex, which
# refuses sequence parallelism for want of one mark on its parameters.
_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """torch's LayerNorm or RMSNorm, as megatron-core's layer specs make a norm.

    Under sequence parallelism each tensor-parallel rank normalises a part of the sequence, so its
    gradient of the norm's parameters is a part of theirs: the mark `sequence_parallel` has
    megatron-core sum them.

    Raises:
        InputError: `config` asks for a norm, or a property of one, that torch does not have.
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


# Implementations by module: the longest prefix counts, and a wrapper is named after what it wraps.
_PACKAGES = {
    "torch": "torch",
    "apex": "Apex",
    "transformer_engine": "Transformer Engine",
    "megatron.core": "megatron-core",
    "megatron.core.fusions.fused_layer_norm": "Apex",
    "megatron.core.extensions.transformer_engine": "Transformer Engine",
    "megatron_tikmix.megatron.attention": "torch",
}


def kernels_in_use(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> str:
    """Name the implementations of Adam, norm and attention that this rank was built from."""
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
    """Name each class once with its package: `torch AdamW`."""
    return ", ".join(sorted({_name(type(thing)) for thing in objects}))


def _name(kind: type) -> str:
    fitting = [name for name in _PACKAGES if f"{kind.__module__}.".startswith(f"{name}.")]
    package = _PACKAGES[max(fitting, key=len)] if fitting else kind.__module__.split(".")[0]
    return f"{package} {kind.__name__}"
