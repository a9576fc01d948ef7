"""Inverse curvature H⁻¹, applied to a gradient. To add one, write a class with this interface.

The classes do not communicate: :func:`fit_curvature`, which makes them, sums over ranks and passes
the sums as arguments.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from megatron_tikmix.config import ProbeConfig
from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.collectives import sum_over_ranks
from megatron_tikmix.megatron.groups import Parallel


class Curvature(Protocol):
    """An approximation of H⁻¹.

    Attributes:
        name: its name in the ledger.
    """

    name: str

    def precondition(self, gradient_P: torch.Tensor) -> torch.Tensor:
        """Return H⁻¹ g on this rank's parameters, float32 (P,); may overwrite `gradient_P`."""
        ...


class Identity:
    """H = 1: influence is the plain inner product of gradients."""

    name = "identity"

    def precondition(self, gradient_P: torch.Tensor) -> torch.Tensor:
        return gradient_P


class DampedDiagonal:
    """H⁻¹ = 1 / (√v + damping · mean √v), v a second moment of gradients.

    With v the optimizer's own (`adam`) and held fixed, influence is to first order proportional
    to what an Adam step along the domain does to the task. Without the relative damping,
    parameters that never had a gradient would dominate.

    Args:
        name: its name in the ledger, by the origin of v.
        second_moment_P: v of this rank's parameters, float32 (P,); overwritten.
        mean_root: mean of √v over all parameters that count, each once and vocabulary padding
            left out (the padding depends on the layout).
        damping: relative to that mean.
    """

    def __init__(
        self, name: str, second_moment_P: torch.Tensor, *, mean_root: float, damping: float
    ) -> None:
        self.name = name
        # In place, since v may be as large as the model. Parameters that never had a gradient need
        # only a finite scale.
        self._scale_P = second_moment_P.sqrt_().add_(damping * mean_root or 1.0).reciprocal_()

    def precondition(self, gradient_P: torch.Tensor) -> torch.Tensor:
        return gradient_P.mul_(self._scale_P)


def fit_curvature(
    config: ProbeConfig,
    shards: OptimizerShards,
    parallel: Parallel,
    domain_gradients: Callable[[], Iterator[torch.Tensor]],
) -> Curvature:
    """Fit the curvature that `config` names at the present parameters. Collective.

    Before the optimizer's first step (or with weights loaded without its state), `adam` is replaced
    by `squared_gradients`, and its name says so.

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
    """Return the mean of squared gradients, without those that are not finite, (P,)."""
    total_P, count = torch.zeros(shards.numel, device=shards.device), 0
    for gradient_P in gradients:
        if not _somewhere(not torch.isfinite(gradient_P).all().item(), parallel):
            total_P.addcmul_(gradient_P, gradient_P)
            count += 1
    return total_P.div_(max(count, 1))


def _somewhere(condition: bool, parallel: Parallel) -> bool:
    """Return whether `condition` holds on any rank. Collective."""
    return sum_over_ranks(torch.tensor(float(condition)), parallel).item() > 0
