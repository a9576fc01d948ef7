"""Correlations and intervals, as the parts report them."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as students_t

Array = NDArray[np.float64]


def correlations(a_NV: Array, b_NV: Array) -> Array:
    """Pearson's r of each column, (V,)."""
    a_NV, b_NV = a_NV - a_NV.mean(axis=0), b_NV - b_NV.mean(axis=0)
    products_V: Array = (a_NV * b_NV).sum(axis=0)
    return products_V / np.sqrt((a_NV**2).sum(axis=0) * (b_NV**2).sum(axis=0))


def bootstrap(
    statistic: Callable[..., Array], *rows_N: Array, seed: int = 0, draws: int = 2000
) -> Array:
    """95% percentile interval of a statistic of rows drawn together, (2, ...)."""
    generator = np.random.default_rng(seed)
    N = len(rows_N[0])
    drawn = []
    for _ in range(draws):
        picks = generator.integers(0, N, N)
        drawn.append(statistic(*(rows[picks] for rows in rows_N)))
    interval: Array = np.quantile(np.array(drawn), [0.025, 0.975], axis=0)
    return interval


def mean_and_interval(values: Any) -> dict[str, float]:
    """Mean and 95% t interval of independent values."""
    values_R = np.asarray(values, dtype=np.float64)
    mean, count = float(values_R.mean()), len(values_R)
    half = float(students_t.ppf(0.975, count - 1) * values_R.std(ddof=1) / np.sqrt(count))
    return {"mean": mean, "low": mean - half, "high": mean + half}
