"""Validation loss of each task, on its reporting items."""

from collections.abc import Sequence

import torch

from megatron_tikmix.data.tasks import Task, micro_batches
from megatron_tikmix.megatron.collectives import sum_over_ranks
from megatron_tikmix.megatron.step import ForwardBackward, evaluation_mode, loss_and_tokens


@torch.no_grad()
def evaluate(
    forward_backward: ForwardBackward, tasks: Sequence[Task], task_samples: int
) -> dict[str, float]:
    """Return the mean loss per unmasked token of each task's reporting items, in nats.

    Args:
        task_samples: the most samples that are taken of each task.
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
