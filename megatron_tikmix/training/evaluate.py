"""Validation loss of each task, on items that do not decide the mixture."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel

from megatron_tikmix.data.tasks import Task, micro_batches
from megatron_tikmix.parallel.collectives import sum_over_ranks
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.training.step import ForwardBackward, LossSums


@contextmanager
def gathered_parameters(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Parameters whole: with `overlap_param_gather` they are not until the next forward pass."""
    gathers_late = [chunk for chunk in model if chunk.ddp_config.overlap_param_gather]
    for chunk in gathers_late:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in gathers_late:
            chunk.enable_forward_pre_hook()


@contextmanager
def evaluation_mode(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Dropout off and parameters whole; every module's mode as it was at the end.

    Draws no random number, so training goes on as if nothing had happened.
    """
    with gathered_parameters(model):
        modes = [(module, module.training) for chunk in model for module in chunk.modules()]
        for chunk in model:
            chunk.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def loss_and_tokens(sums: LossSums, parallel: Parallel) -> torch.Tensor:
    """Summed loss and unmasked tokens of this rank's micro-batches, float64 (2,).

    Zero on all but one rank of each model replica, so a sum over ranks counts once.
    """
    total = torch.zeros(2, dtype=torch.float64)
    if parallel.reports_loss:
        for rows in sums:
            total += torch.stack([rows["loss"].double().sum(), rows["tokens"].double().sum()]).cpu()
    return total


@torch.no_grad()
def evaluate(
    forward_backward: ForwardBackward, tasks: Sequence[Task], task_samples: int
) -> dict[str, float]:
    """Mean loss per unmasked token of each task's reporting items, in nats.

    Args:
        task_samples: at most so many samples of each task.
    """
    parallel = forward_backward.parallel
    totals = []
    with evaluation_mode(forward_backward.model):
        for task in tasks:
            batches = micro_batches(
                task.report,
                range(min(task_samples, task.report.samples_per_epoch)),
                micro_batch_size=forward_backward.micro_batch_size,
                rank=parallel.data_parallel_rank,
                size=parallel.data_parallel_size,
                multiple=forward_backward.microbatch_multiple,
            )
            sums = forward_backward(batches, len(batches), forward_only=True)
            totals.append(loss_and_tokens(sums, parallel))
    loss_V2 = sum_over_ranks(torch.stack(totals), parallel)
    return {task.name: (loss / n).item() for task, (loss, n) in zip(tasks, loss_V2, strict=True)}
