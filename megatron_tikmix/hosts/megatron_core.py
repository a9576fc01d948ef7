"""Mixture resets in any Megatron training loop (docs/hosting.md).

::

    parallel = Parallel.from_megatron()
    data = open_data(config, parallel)
    remixer = build_remixer(
        config, data, model, optimizer, opt_param_scheduler, forward_step, parallel
    )
    ...
    decision = remixer.remix(Boundary.of(schedule, ledger, ...))
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.rerun_state_machine import RerunStateMachine

from megatron_tikmix.config import HostedConfig
from megatron_tikmix.config.checks import check_boundaries
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.decision.decide import Boundary, Decision
from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.measure.probe_plan import ProbeSizes, Trained, plan_probe_of
from megatron_tikmix.measure.remixer import Progress, Remixer, load_data
from megatron_tikmix.megatron.collectives import make_on_all_ranks, sum_over_ranks
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.optimizer import distributed_optimizers
from megatron_tikmix.megatron.samples import DocumentBoundaries
from megatron_tikmix.megatron.step import ForwardBackward

__all__ = [
    "Boundary",
    "Decision",
    "HostedConfig",
    "Parallel",
    "Remixer",
    "TrainingData",
    "build_remixer",
    "open_data",
]


def open_data(config: HostedConfig, parallel: Parallel) -> TrainingData:
    """Open the domains, tasks and first mixture of `config`. Collective.

    Raises:
        InputError: on every rank: the data cannot be trained on.
    """
    return make_on_all_ranks(parallel, lambda: load_data(config))


def build_remixer(
    config: HostedConfig,
    data: TrainingData,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler | None,
    forward_step_func: Callable[..., Any],
    parallel: Parallel,
    *,
    on_probe: Progress = lambda done, total: None,
    on_rollout: Progress = lambda done, total: None,
) -> Remixer:
    """Build a Remixer from the objects of a Megatron loop. Collective.

    Args:
        model: this rank's chunks, each in DistributedDataParallel, with the schedule's hooks
            (`finalize_model_grads_func` and the like) set in its configuration.
        optimizer: megatron-core's distributed optimizer, with Adam.
        opt_param_scheduler: needed by rollouts and audits only.
        forward_step_func: the loop's own. Its loss function must return (summed loss, tokens,
            dict), as that of Megatron-LM's pretrain_gpt.py does; its iterator yields micro-batches
            of `tokens`, `labels`, `loss_mask` and `position_ids`, on every rank.
        on_probe, on_rollout: called with (done, total) passes and rollouts.

    Raises:
        InputError: on every rank: influence cannot be measured, with the reason.
    """
    make_on_all_ranks(parallel, lambda: _check(config, data, model, optimizer, parallel))
    if config.needs_rollouts and opt_param_scheduler is None:
        raise InputError("rollouts and audits need the loop's opt_param_scheduler")
    forward_backward = ForwardBackward(
        model,
        parallel,
        config.train.micro_batch_size,
        config.data.sequence_length,
        partial(_with_sums, forward_step_func, data.boundaries),
    )
    plan = plan_probe_of(_trained(forward_backward), config, ProbeSizes.of(data))
    if plan is None:
        raise InputError("remix: nothing is decided; set remix.policy and remix.interval_samples")
    return Remixer.of(
        config,
        data,
        forward_backward,
        optimizer,
        opt_param_scheduler,
        plan,
        on_probe=on_probe,
        on_rollout=on_rollout,
    )


def _with_sums(
    forward_step_func: Callable[..., Any],
    boundaries: DocumentBoundaries,
    data_iterator: Any,
    model: torch.nn.Module,
    *more: Any,
) -> tuple[Any, Callable[..., Any]]:
    """Call the loop's `forward_step_func`; name loss and tokens as this package does."""
    output, loss_func = forward_step_func(map(boundaries.applied, data_iterator), model, *more)
    return output, partial(_sums, loss_func)


def _sums(loss_func: Callable[..., Any], output: torch.Tensor) -> tuple[Any, Any, dict[str, Any]]:
    with _unvalidated_results():
        found = loss_func(output)
    if len(found) != 3:
        raise TrainingError(
            "the loss function of forward_step_func returns a mean; return (summed loss, tokens, "
            "dict), as Megatron-LM's pretrain_gpt.py does, so that every token can weigh the same"
        )
    loss, tokens, _ = found
    # Copies, since without `calculate_per_token_loss` the schedule divides the loss in place.
    rows = {"loss": loss.detach().clone().view(1), "tokens": tokens.detach().clone().view(1)}
    return loss, tokens, rows


@contextmanager
def _unvalidated_results() -> Iterator[None]:
    """Turn off Megatron-LM's validation of losses by its rerun state machine, which fails outside
    a training step, and on a single rank where a loss is not finite."""
    former = RerunStateMachine.validate_result
    RerunStateMachine.validate_result = lambda self, *_, **__: None
    try:
        yield
    finally:
        RerunStateMachine.validate_result = former


def _trained(forward_backward: ForwardBackward) -> Trained:
    """Return the properties on which a probe's cost depends, counted on the model. Collective."""
    parallel = forward_backward.parallel
    of_ranks = torch.zeros(parallel.world_size, dtype=torch.float64)
    of_ranks[parallel.rank] = sum(
        p.numel() for chunk in forward_backward.model for p in chunk.parameters()
    )
    of_ranks = sum_over_ranks(of_ranks, parallel)
    return Trained(
        data_parallel_size=parallel.data_parallel_size,
        microbatch_multiple=forward_backward.microbatch_multiple,
        parameters=int(of_ranks.max()),
        flops_per_token=6 * of_ranks.sum().item() / parallel.data_parallel_size,
    )


def _check(
    config: HostedConfig,
    data: TrainingData,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    parallel: Parallel,
) -> None:
    """Refuse a model or an optimizer on which influence cannot be measured."""
    if not all(isinstance(chunk, DistributedDataParallel) for chunk in model):
        names = ", ".join(sorted({type(chunk).__name__ for chunk in model}))
        raise InputError(
            f"model: chunks must be megatron-core DistributedDataParallel, not {names}"
        )
    try:
        parts = distributed_optimizers(optimizer)
    except TypeError as error:
        raise InputError(f"optimizer: {error}") from error
    first, ddp = model[0].config, model[0].ddp_config
    unsupported = {
        "context parallelism": parallel.groups.cp.size() > 1,
        "fp16": first.fp16,
        "fp8": bool(first.fp8),
        "num_moe_experts": first.num_moe_experts is not None,
        "mtp_num_layers": bool(first.mtp_num_layers),
        "fp4": bool(getattr(first, "fp4", None)),
        "optimizer_cpu_offload": parts[0].config.optimizer_cpu_offload,
        "use_precision_aware_optimizer": parts[0].config.use_precision_aware_optimizer,
        "num_distributed_optimizer_instances": ddp.num_distributed_optimizer_instances > 1,
    }
    for name, used in unsupported.items():
        if used:
            raise InputError(f"{name} is not supported yet by a Remixer")
    if first.finalize_model_grads_func is None:
        raise InputError(
            "model: finalize_model_grads_func is not set in its configuration; set it as the loop "
            "does before its first step, and build the Remixer after"
        )
    step = config.train.micro_batch_size * parallel.data_parallel_size
    if config.train.global_batch_size % step:
        raise InputError(
            f"train.global_batch_size ({config.train.global_batch_size}) must be a multiple of "
            f"micro_batch_size × data-parallel ranks = {step}"
        )
    betas = [group["betas"] for part in parts for group in part.optimizer.param_groups]
    check_boundaries(config, max((beta2 for _, beta2 in betas), default=0.0))
