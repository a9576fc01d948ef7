"""Inverse curvature H⁻¹, applied to a gradient.

To add one, write a class with the interface of :class:`Curvature` and a function that fits it, and
add an entry to :data:`CURVATURES` and its name to the values of `probe.curvature` in
`config/sections.py`. It sees this rank's parameters as one flat vector, without layers' shapes.

The classes do not communicate: the functions that fit them sum over ranks, and pass the sums as
arguments.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Fit:
    """The objects from which a curvature is fitted.

    Attributes:
        domain_gradients: returns mean gradients of fresh sub-batches, one of each domain, this
            rank's shard, float32 (P,). Each costs a pass.
    """

    config: ProbeConfig
    shards: OptimizerShards
    parallel: Parallel
    domain_gradients: Callable[[], Iterator[torch.Tensor]]


def fit_curvature(fit: Fit) -> Curvature:
    """Return the curvature that `probe.curvature` names, at the present parameters. Collective."""
    return CURVATURES[fit.config.curvature].fitted(fit)


def _adam(fit: Fit) -> Curvature:
    """Use Adam's second moment; before its first step, or without its state, squared gradients."""
    if _somewhere(not fit.shards.has_second_moment(), fit.parallel):
        return _squared_gradients(fit)
    return _diagonal("adam", fit.shards.second_moment(), fit)


def _squared_gradients(fit: Fit) -> Curvature:
    second_moment_P = _mean_square(fit.domain_gradients(), fit.shards, fit.parallel)
    return _diagonal("squared_gradients", second_moment_P, fit)


def _diagonal(name: str, second_moment_P: torch.Tensor, fit: Fit) -> Curvature:
    sums = sum_over_ranks(fit.shards.root_sum_and_count(second_moment_P), fit.parallel)
    total, count = sums.tolist()
    return DampedDiagonal(
        name, second_moment_P, mean_root=total / max(count, 1.0), damping=fit.config.damping
    )


@dataclass(frozen=True)
class Kind:
    """A value of `probe.curvature`.

    Attributes:
        fitted: returns it, fitted; collective.
        passes_domains: whether fitting passes a sub-batch of each domain, which the probe's plan
            then counts.
    """

    fitted: Callable[[Fit], Curvature]
    passes_domains: bool = False


CURVATURES = {
    "identity": Kind(lambda fit: Identity()),
    "adam": Kind(_adam),
    "squared_gradients": Kind(_squared_gradients, passes_domains=True),
}
"""By the name in the configuration."""


def _mean_square(
    gradients: Iterator[torch.Tensor], shards: OptimizerShards, parallel: Parallel
) -> torch.Tensor:
    """Return the mean of squared gradients, without those that are not finite, (P,)."""
    total_P, count = torch.zeros(shards.numel, device=shards.device), 0
    for gradient_P in gradients:
        if not _somewhere(~torch.isfinite(gradient_P).all(), parallel):
            total_P.addcmul_(gradient_P, gradient_P)
            count += 1
    return total_P.div_(max(count, 1))


def _somewhere(condition: bool | torch.Tensor, parallel: Parallel) -> bool:
    """Return whether `condition` holds on any rank. Collective."""
    return sum_over_ranks(torch.as_tensor(condition).int(), parallel).item() > 0
