"""megatron-core's optimizer and learning-rate schedule."""

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tikmix.config import RunConfig
from megatron_tikmix.megatron.faults import norm_on_the_device
from megatron_tikmix.megatron.groups import Parallel


def build_optimizer(
    config: RunConfig, model: list[DistributedDataParallel], parallel: Parallel
) -> MegatronOptimizer:
    """Return the distributed optimizer over all model chunks."""
    norm_on_the_device()
    return get_megatron_optimizer(
        config.optimizer, model, use_gloo_process_groups=False, pg_collection=parallel.groups
    )


def build_scheduler(config: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Return the learning-rate and weight-decay schedule, counted in samples as in Megatron."""
    schedule, samples = config.scheduler, config.train.consumed_samples
    decay_iters = schedule.lr_decay_iters or config.train.train_iters
    decay_samples = samples(decay_iters)
    weight_decay = config.optimizer.weight_decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=samples(schedule.lr_warmup_iters),
        lr_decay_steps=decay_samples,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=decay_samples,
        wd_incr_style="constant",
        wsd_decay_steps=decay_samples - samples(decay_iters - (schedule.lr_wsd_decay_iters or 0)),
        lr_wsd_decay_style="exponential",
        # A resumed run follows its configuration, not the schedule stored in the checkpoint.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """Return the distributed optimizers inside `optimizer`.

    Raises:
        TypeError: it contains anything else.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        if not isinstance(part, DistributedOptimizer):
            raise TypeError(
                f"{type(part).__name__} has no sharded second moment to read; "
                f"use megatron-core's distributed optimizer with Adam"
            )
    return [part for part in parts if not part.is_stub_optimizer]
