"""Refuses what cannot run, field by field, before anything is built.

Apart from `run.py`, since a host calls :func:`check_boundaries` for sections that are no RunConfig.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.core.transformer.enums import AttnBackend

from megatron_tikmix.errors import require

if TYPE_CHECKING:
    from megatron_tikmix.config.run import RunConfig
    from megatron_tikmix.config.sections import MixtureSections


UNSUPPORTED: dict[str, tuple[Callable[["RunConfig"], bool], str]] = {
    "model.context_parallel_size": (
        lambda c: c.model.context_parallel_size > 1,
        "samples are not cut over ranks yet, so each would see the whole of them",
    ),
    "model.expert_model_parallel_size": (
        lambda c: c.model.expert_model_parallel_size > 1,
        "experts are reduced over groups of their own, which influence is not summed over",
    ),
    "model.num_moe_experts": (
        lambda c: c.model.num_moe_experts is not None,
        "a router's auxiliary loss is no part of a domain's loss, and its gradient would be",
    ),
    "model.mtp_num_layers": (
        lambda c: bool(c.model.mtp_num_layers),
        "the losses of multi-token prediction would be added to that which influence is about",
    ),
    "model.multi_latent_attention": (
        lambda c: c.model.multi_latent_attention,
        "no layer with it is built",
    ),
    "model.fp16": (
        lambda c: c.model.fp16,
        "its loss scale would scale the gradients of a probe too; use model.bf16",
    ),
    "model.fp8": (
        lambda c: bool(c.model.fp8),
        "its scaling factors are those of training, and a probe's passes would change them",
    ),
    "model.fp4": (
        lambda c: bool(getattr(c.model, "fp4", None)),
        "its scaling factors are those of training, and a probe's passes would change them",
    ),
    "model.cross_entropy_loss_fusion": (
        lambda c: c.model.cross_entropy_loss_fusion,
        "it casts gradients to bf16, also in fp32: losses would change without a word",
    ),
    "ddp.use_megatron_fsdp": (
        lambda c: c.ddp.use_megatron_fsdp,
        "a probe reads gradients in megatron-core's gradient buffers, which FSDP does not have",
    ),
    "ddp.num_distributed_optimizer_instances": (
        lambda c: c.ddp.num_distributed_optimizer_instances > 1,
        "each instance holds all slices, so a gradient would be counted once an instance",
    ),
    "ddp.average_in_collective": (
        lambda c: c.ddp.average_in_collective,
        "gradients are sums over tokens here, and averaging divides them by the ranks",
    ),
    "optimizer.optimizer": (
        lambda c: c.optimizer.optimizer != "adam",
        "influence is preconditioned by Adam's second moment; use adam",
    ),
    "optimizer.optimizer_cpu_offload": (
        lambda c: c.optimizer.optimizer_cpu_offload,
        "the second moment is then not where a probe reads it",
    ),
    "optimizer.use_precision_aware_optimizer": (
        lambda c: c.optimizer.use_precision_aware_optimizer,
        "the second moment is then scaled, and held by an optimizer that a probe cannot read",
    ),
}
"""What megatron-core has and cannot be used here yet, by field: whether it is used, and why not."""


TORCH_ATTENTION = {
    "window_size": None,
    "softmax_type": "vanilla",
    "attention_softmax_in_fp32": True,
    "masked_softmax_fusion": False,
    "deterministic_mode": False,  # flash sums gradients in any order
}
"""Fields on attention, and their one value with torch's scaled_dot_product_attention."""


def check_supported(config: "RunConfig") -> None:
    """Refuse what megatron-core has and we cannot use yet."""
    for name, (used, reason) in UNSUPPORTED.items():
        require(not used(config), name, f"is not supported yet: {reason}; leave it at its default")
    model = config.model
    # Transformer Engine's causal attention and windows pay no heed to a mask.
    require(
        not config.data.reset_attention_mask
        or not (model.uses_transformer_engine or model.window_size),
        "data.reset_attention_mask",
        "needs model.transformer_impl local, and no model.window_size",
    )
    require(
        not (model.uses_transformer_engine and model.attention_backend is AttnBackend.local),
        "model.attention_backend",
        "local needs model.transformer_impl local",
    )
    for field, served in TORCH_ATTENTION.items() if model.uses_torch_attention else ():
        require(
            getattr(model, field) == served,
            f"model.{field}",
            f"({getattr(model, field)}) is not supported by torch's scaled_dot_product_attention; "
            f"leave it at {served}, or set model.attention_backend local",
        )
    require(model.calculate_per_token_loss, "model.calculate_per_token_loss", "must stay true")


def check_layout(config: "RunConfig", world_size: int) -> None:
    """Check the sizes that ranks, pipeline or micro-batches must divide."""
    model, train = config.model, config.train
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    require(
        world_size % (tp * pp) == 0,
        "model",
        f"needs a multiple of tensor_model_parallel_size {tp} × pipeline_model_parallel_size "
        f"{pp} = {tp * pp} ranks, and {world_size} were launched",
    )
    require(
        model.make_vocab_size_divisible_by % tp == 0,
        "model.make_vocab_size_divisible_by",
        f"must be a multiple of tensor_model_parallel_size {tp}",
    )
    require(
        model.hidden_size % model.num_attention_heads == 0,
        "model.hidden_size",
        f"({model.hidden_size}) must be a multiple of num_attention_heads "
        f"{model.num_attention_heads}",
    )
    groups = model.num_query_groups or model.num_attention_heads
    require(
        model.num_attention_heads % groups == 0 and groups % tp == 0,
        "model.num_query_groups",
        f"({groups}) must divide num_attention_heads {model.num_attention_heads}, and be a "
        f"multiple of tensor_model_parallel_size {tp}",
    )
    require(
        (model.ffn_hidden_size or 0) > 0 and model.ffn_hidden_size % tp == 0,
        "model.ffn_hidden_size",
        f"({model.ffn_hidden_size}) must be a multiple of tensor_model_parallel_size {tp}",
    )
    require(
        not model.sequence_parallel or config.data.sequence_length % tp == 0,
        "data.sequence_length",
        f"({config.data.sequence_length}) must be a multiple of tensor_model_parallel_size {tp}, "
        f"for model.sequence_parallel",
    )
    require(
        model.virtual_pipeline_model_parallel_size is None or pp > 1,
        "model.virtual_pipeline_model_parallel_size",
        "needs pipeline_model_parallel_size 2 or more",
    )
    layers_at_once = pp * (model.virtual_pipeline_model_parallel_size or 1)
    require(
        model.num_layers % layers_at_once == 0,
        "model.num_layers",
        f"({model.num_layers}) must be a multiple of {layers_at_once} pipeline stages",
    )
    step = train.micro_batch_size * config.data_parallel_size(world_size)
    for _, size in train.batch_sizes.steps:
        field, of = "train.global_batch_size", f"({size})"
        if size != train.global_batch_size:
            field, of = "train.rampup_batch_size", f"gives batches of {size}, which"
        require(
            size % step == 0,
            field,
            f"{of} must be a multiple of micro_batch_size {train.micro_batch_size} × "
            f"{config.data_parallel_size(world_size)} data-parallel ranks = {step}",
        )
        require(
            model.virtual_pipeline_model_parallel_size is None or size // step % pp == 0,
            field,
            f"{of} must give a multiple of {pp} micro-batches, for the interleaved "
            f"pipeline; it gives {size // step}",
        )


def check_schedule(config: "RunConfig") -> None:
    """Check the optimizer and its learning rate over the run."""
    lr, min_lr = config.optimizer.lr, config.optimizer.min_lr
    require(lr is not None and lr > 0, "optimizer.lr", "must be given, and positive")
    require(0 <= min_lr <= lr, "optimizer.min_lr", f"({min_lr}) must be from 0 to lr {lr}")
    for name in ("adam_beta1", "adam_beta2"):
        value = getattr(config.optimizer, name)
        require(0 <= value < 1, f"optimizer.{name}", f"({value}) must be from 0 to below 1")
    require(config.optimizer.weight_decay >= 0, "optimizer.weight_decay", "must not be negative")
    decay_iters = config.scheduler.lr_decay_iters
    decay_iters = config.train.train_iters if decay_iters is None else decay_iters
    require(decay_iters > 0, "scheduler.lr_decay_iters", "must be positive")
    require(
        config.scheduler.lr_wsd_decay_iters is None
        or 0 < config.scheduler.lr_wsd_decay_iters <= decay_iters,
        "scheduler.lr_wsd_decay_iters",
        f"must be from 1 to the {decay_iters} iterations of the schedule",
    )
    require(
        config.scheduler.lr_warmup_iters < decay_iters,
        "scheduler.lr_warmup_iters",
        f"({config.scheduler.lr_warmup_iters}) must be fewer than the {decay_iters} iterations "
        f"of the schedule",
    )


def check_boundaries(config: "MixtureSections", adam_beta2: float) -> None:
    """Check where intervals end.

    Args:
        adam_beta2: of the optimizer, whose second moment must have settled by then.
    """
    require(
        not config.remix.constraints.epoch_caps,
        "remix.constraints.epoch_caps",
        "follows from remix.constraints.max_epochs; set that",
    )
    remix, batch = config.remix, config.train.global_batch_size
    require(
        remix.first_interval_samples is None or remix.interval_samples is not None,
        "remix.first_interval_samples",
        "goes with remix.interval_samples",
    )
    if remix.interval_samples is None or remix.policy == "schedule":
        return
    first = "interval_samples" if remix.first_interval_samples is None else "first_interval_samples"
    for name in {"interval_samples", first}:
        samples = getattr(remix, name)
        below = max(samples // batch * batch, 0)
        require(
            samples > 0 and samples % batch == 0,
            f"remix.{name}",
            f"({samples}) must be a whole number of global batches of {batch} samples; the "
            f"nearest are {below or batch} and {(below or batch) + batch}",
        )
    samples = getattr(remix, first)
    settled = math.ceil(3 / (1 - adam_beta2))
    sizes = config.train.batch_sizes
    begins = int(sizes.batch_of(sizes.end_from(samples)))
    require(
        remix.policy == "static" or config.probe.curvature != "adam" or begins >= settled,
        f"remix.{first}",
        f"({samples}) puts the first boundary at iteration {begins}, before Adam's "
        f"second moment has settled (3 / (1 − adam_beta2) = {settled} iterations); use at "
        f"least {settled * batch}, a smaller optimizer.adam_beta2, or probe.curvature identity",
    )
