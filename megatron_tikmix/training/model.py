"""The model: megatron-core's GPTModel from a layer spec, wrapped for data parallelism."""

import copy
import math
from collections.abc import Callable

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
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_tikmix.config import GPTConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.norms import with_torch_norm


def padded_vocab_size(vocab_size: int, config: GPTConfig) -> int:
    """Vocabulary rounded up to make_vocab_size_divisible_by: the same for every layout."""
    multiple = config.make_vocab_size_divisible_by
    return math.ceil(vocab_size / multiple) * multiple


def uses_transformer_engine(config: GPTConfig) -> bool:
    """Whether layers come from Transformer Engine: on request, or on a GPU that has it.

    Raises:
        InputError: it is asked for, and not installed.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if config.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise InputError(
            "model.transformer_impl transformer_engine: Transformer Engine cannot be imported "
            "here; install it, or use local, or auto, which takes it where it is"
        )
    if config.transformer_impl != "auto":
        return config.transformer_impl == "transformer_engine"
    return torch.cuda.is_available() and bool(HAVE_TE)


def layer_spec(config: GPTConfig) -> ModuleSpec:
    """The transformer layer that `config` asks for."""
    if uses_transformer_engine(config):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return with_torch_norm(
        get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    )


def block_spec(
    config: GPTConfig, groups: ProcessGroupCollection, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the norm after the last."""
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
    """This rank's model chunks, one, or one per virtual pipeline stage."""
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
