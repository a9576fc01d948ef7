"""Influence averaged over boundaries: draws of S average out, at the price of looking back."""

from collections.abc import Sequence

import numpy as np

from megatron_tikmix.mixing.influence_matrix import InfluenceMatrix


def smoothed(history: Sequence[InfluenceMatrix], smoothing: float) -> InfluenceMatrix:
    """The exponential moving average of the normalised rows, in the units of the latest matrix.

    With s = `smoothing`, row i of the answer is n_i · Σ_k c_k · (row i of boundary k, over its own
    n), where c_k ∝ sᵏ for the boundary k before the latest, Σ c = 1. Rows
    are normalised first since gradients shrink as the model learns, and an average of raw rows
    would be one of the first boundaries. Standard errors are those of a weighted sum of independent
    estimates.

    Args:
        history: at least one matrix, the latest last. Domains and tasks are those of the latest; a
            boundary at which one of them was not measured is left out.
        smoothing: 0 (the latest alone) to below 1.
    """
    latest = history[-1]
    usable = [
        matrix
        for matrix in history
        if set(matrix.domains) >= set(latest.domains) and set(matrix.tasks) >= set(latest.tasks)
    ]
    coefficients = smoothing ** np.arange(len(usable))[::-1] if smoothing else np.zeros(len(usable))
    coefficients[-1] = 1.0
    coefficients = coefficients / coefficients.sum()
    values_VD, variance_VD = np.zeros_like(latest.values_VD), np.zeros_like(latest.values_VD)
    for c, matrix in zip(coefficients.tolist(), usable, strict=True):
        order = np.ix_(
            [matrix.tasks.index(task) for task in latest.tasks],
            [matrix.domains.index(domain) for domain in latest.domains],
        )
        scale_V1 = matrix.scale_V[order[0][:, 0], None]
        values_VD += c * matrix.values_VD[order] / scale_V1
        errors_VD = matrix.normalised_errors()
        if errors_VD is not None:
            variance_VD += (c * errors_VD[order]) ** 2
    scale_V1 = latest.scale_V[:, None]
    known = latest.standard_error_VD is not None
    return InfluenceMatrix(
        values_VD * scale_V1,
        domains=latest.domains,
        tasks=latest.tasks,
        standard_error_VD=np.sqrt(variance_VD) * scale_V1 if known else None,
        degrees_of_freedom=latest.degrees_of_freedom,
    )
