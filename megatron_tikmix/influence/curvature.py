"""Inverse curvature H⁻¹, applied to a gradient. A new one is a new class with this interface.

None of these talks to other ranks: what has to be summed over ranks comes in as an argument
(see :mod:`megatron_tikmix.training.curvature`, which makes them).
"""

from typing import Protocol

import torch


class Curvature(Protocol):
    """Anything that can stand for H⁻¹.

    Attributes:
        name: what was used, as the ledger has it.
    """

    name: str

    def precondition(self, gradient_P: torch.Tensor) -> torch.Tensor:
        """H⁻¹ g on this rank's parameters, float32 (P,) to (P,); may overwrite `gradient_P`."""
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
        name: where v comes from.
        second_moment_P: v of this rank's parameters, float32 (P,); overwritten.
        mean_root: mean of √v over all parameters that count, each once and vocabulary padding
            left out (the padding depends on the layout).
        damping: relative to that mean.
    """

    def __init__(
        self, name: str, second_moment_P: torch.Tensor, *, mean_root: float, damping: float
    ) -> None:
        self.name = name
        # In place: v may be as large as the model. Where there never was a gradient, any scale
        # will do that is finite.
        self._scale_P = second_moment_P.sqrt_().add_(damping * mean_root or 1.0).reciprocal_()

    def precondition(self, gradient_P: torch.Tensor) -> torch.Tensor:
        return gradient_P.mul_(self._scale_P)
