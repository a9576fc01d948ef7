"""Makes the curvature that a probe asks for, out of what the optimizer or the probe has."""

from collections.abc import Callable, Iterator

import torch

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.influence.curvature import Curvature, DampedDiagonal, Identity
from megatron_tikmix.parallel.collectives import sum_over_ranks
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.training.optimizer_state import OptimizerShards


def fit_curvature(
    config: ProbeConfig,
    shards: OptimizerShards,
    parallel: Parallel,
    domain_gradients: Callable[[], Iterator[torch.Tensor]],
) -> Curvature:
    """The curvature of `config`, fitted at the parameters as they are. Collective.

    `adam` before the optimizer's first step (or with weights that came without its state) is
    `squared_gradients` instead, and says so in its name.

    Args:
        domain_gradients: mean gradients of fresh sub-batches, this rank's shard, float32 (P,);
            called only by a curvature that needs them.
    """
    if config.curvature == "identity":
        return Identity()
    name = config.curvature
    if name == "adam" and _somewhere(not shards.has_second_moment(), parallel):
        name = "squared_gradients"
    if name == "adam":
        second_moment_P = shards.second_moment()
    else:
        second_moment_P = _mean_square(domain_gradients(), shards, parallel)
    total, count = sum_over_ranks(shards.root_sum_and_count(second_moment_P), parallel).tolist()
    return DampedDiagonal(
        name, second_moment_P, mean_root=total / max(count, 1.0), damping=config.damping
    )


def _mean_square(
    gradients: Iterator[torch.Tensor], shards: OptimizerShards, parallel: Parallel
) -> torch.Tensor:
    """Mean of the squared gradients that are finite, (P,): the probe's own second moment."""
    total_P, count = torch.zeros(shards.numel, device=shards.device), 0
    for gradient_P in gradients:
        if not _somewhere(not torch.isfinite(gradient_P).all().item(), parallel):
            total_P.addcmul_(gradient_P, gradient_P)
            count += 1
    return total_P.div_(max(count, 1))


def _somewhere(condition: bool, parallel: Parallel) -> bool:
    """Whether it holds on any rank. Collective."""
    return sum_over_ranks(torch.tensor(float(condition)), parallel).item() > 0
