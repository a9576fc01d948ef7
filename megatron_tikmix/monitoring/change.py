"""The change of a domain's weight at a boundary, as a sum of parts.

At the optimum what pushes a weight adds up to 0, and the push of diversity, relative to its mean
over the mixture w, is −γ (ln w_j/r_j − KL(w ‖ r)) with r the reference mixture. So with the weight
before, v_j, and what gain, uniformity and active constraints push, g_ij, u_j and c_j,

    ln w_j/v_j = (Σ_i g_ij + u_j + c_j) / γ  +  ln r_j/v_j  +  KL(w ‖ r)

exactly. Times the logarithmic mean of w_j and v_j, which is (w_j − v_j) / ln(w_j/v_j), each term
becomes its part of the change of the weight, and they add up to it: the logarithmic mean Divisia
index, B. W. Ang, Energy Policy 32 (2004) 1131.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

TINY = 1e-12
"""A weight below it has no logarithm to speak of, and a change to or from it no parts."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What made the solver's answer differ from the mixture before, in weight.

    All but `noise` add up to `total`.
    """

    gain: dict[str, float]
    """By task."""

    uniformity: float
    constraints: float

    diversity: float
    """Towards the reference mixture; 0 where that is the mixture before."""

    shared: float
    """What every domain's weight is multiplied by alike, so that weights sum to 1."""

    total: float
    """The answer's weight less the weight before."""

    noise: float | None
    """Standard error of gain and uniformity together, at most, at the answer."""


def decomposed(
    before: float,
    answer: float,
    *,
    gain: Mapping[str, float | None],
    uniformity: float | None,
    constraints: float | None,
    noise: float | None,
    reference: float,
    divergence: float,
    gamma: float,
) -> Change | None:
    """The change from `before` to `answer` in its parts; None where one of them is not known.

    Args:
        gain, uniformity, constraints, noise: pushes, in units of the objective per unit of weight.
        reference: the domain's weight in the mixture that diversity is measured from.
        divergence: KL(answer ‖ reference), of the mixtures.
        gamma: weight of the diversity term.
    """
    known = {task: push for task, push in gain.items() if push is not None}
    if uniformity is None or constraints is None or len(known) < len(gain):
        return None
    if gamma <= 0 or min(before, answer, reference) < TINY or not math.isfinite(divergence):
        return None
    mean = _logarithmic_mean(before, answer)
    return Change(
        gain={task: mean * push / gamma for task, push in known.items()},
        uniformity=mean * uniformity / gamma,
        constraints=mean * constraints / gamma,
        diversity=mean * math.log(reference / before),
        shared=mean * divergence,
        total=answer - before,
        noise=None if noise is None else mean * noise / gamma,
    )


def _logarithmic_mean(a: float, b: float) -> float:
    """(a − b) / (ln a − ln b), and a where they are equal."""
    ratio = math.log(a / b)
    return a if abs(ratio) < 1e-9 else (a - b) / ratio
