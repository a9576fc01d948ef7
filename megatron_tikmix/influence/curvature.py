"""Inverse curvature H⁻¹, applied to a gradient. A new one is a new class here.

None of these talks to other ranks: what has to be summed over ranks comes in as an argument.
"""

from typing import Protocol

import torch


class Curvature(Protocol):
    """Anything that can stand for H⁻¹."""

    name: str

    def inverse_product(self, gradient_P: torch.Tensor) -> torch.Tensor:
        """H⁻¹ g on this rank's parameters, (P,) to (P,)."""
        ...


class Identity:
    """H = 1: influence is the plain inner product of gradients."""

    name = "identity"

    def inverse_product(self, gradient_P: torch.Tensor) -> torch.Tensor:
        return gradient_P


class DampedAdam:
    """H⁻¹ = 1 / (√v̂ + damping · mean √v̂), v̂ the optimizer's bias-corrected second moment.

    To first order, and with v̂ held fixed, influence is then proportional to what an Adam step
    along the domain does to the task. Without the relative damping, parameters that never
    had a gradient would dominate.

    Args:
        second_moment_P: v̂ of this rank's parameters, (P,).
        mean_root: mean of √v̂ over all parameters of the model, each counted once and
            vocabulary padding left out (the padding depends on the layout).
        damping: relative to that mean.
    """

    name = "adam"

    def __init__(self, second_moment_P: torch.Tensor, *, mean_root: float, damping: float) -> None:
        self._scale_P = 1.0 / (second_moment_P.sqrt() + damping * mean_root)

    def inverse_product(self, gradient_P: torch.Tensor) -> torch.Tensor:
        return gradient_P * self._scale_P
