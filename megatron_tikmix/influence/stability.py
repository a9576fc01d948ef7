"""Rank stability: do domains keep their ranks from one boundary to the next, apart from noise?

The paper's first version says that preferences drift, its second that their ranking is invariant
over long intervals. A rank correlation alone cannot tell, since noise in the two estimates lowers
it too. So each is given with its ceiling, the correlation expected if the true influence had not
changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from megatron_tikmix.influence.bank import SubBatchBank

Array = NDArray[np.float64]

_SPLITS = 20


@dataclass(frozen=True)
class RankStability:
    """Spearman correlations of the domains' influence between two boundaries.

    Attributes:
        correlation: by task, −1 to 1; None for fewer than 3 domains, or where all are equal.
        ceiling: by task, the correlation expected if only noise had changed, 0 to 1; None as above.
    """

    correlation: dict[str, float | None]
    ceiling: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the ledger."""
        return {"correlation": self.correlation, "ceiling": self.ceiling}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RankStability":
        """Undo :meth:`to_json`."""
        return cls(dict(data["correlation"]), dict(data["ceiling"]))


def rank_stability(
    before: SubBatchBank, after: SubBatchBank, generator: np.random.Generator
) -> RankStability:
    """Compare two boundaries' influence, over the domains and tasks usable in both.

    The ceiling is √(r_before · r_after), each r the reliability of one estimate's ranks: the rank
    correlation of random halves of its sub-batches, stepped up to the whole by the
    Spearman-Brown formula 2r/(1 + r), and averaged over splits.
    """
    before, after = before.usable(), after.usable()
    domains = [name for name in before.domains if name in after.domains]
    tasks = [name for name in before.tasks if name in after.tasks]
    reliability = {}
    values = {}
    for which, bank in (("before", before), ("after", after)):
        rows = [bank.domains.index(name) for name in domains]
        columns = [bank.tasks.index(name) for name in tasks]
        part = SubBatchBank(
            bank.sums_DBV[np.ix_(rows, range(bank.sums_DBV.shape[1]), columns)],
            bank.tokens_DB[rows],
            domains,
            tasks,
        )
        values[which] = _ratios(part, part.tokens_DB > 0)
        reliability[which] = _reliability(part, generator)
    correlation, ceiling = {}, {}
    for v, task in enumerate(tasks):
        correlation[task] = spearman(values["before"][:, v], values["after"][:, v])
        both = reliability["before"][v], reliability["after"][v]
        known = correlation[task] is not None and None not in both
        ceiling[task] = float(np.sqrt(both[0] * both[1])) if known else None  # type: ignore[operator]
    return RankStability(correlation, ceiling)


def spearman(first_D: Array, second_D: Array) -> float | None:
    """Return the rank correlation, ties at their mean rank; None for fewer than 3 values, or for
    equal ones."""
    if len(first_D) < 3:
        return None
    if np.ptp(first_D) == 0 or np.ptp(second_D) == 0:
        return None
    return float(spearmanr(first_D, second_D).statistic)


def _reliability(bank: SubBatchBank, generator: np.random.Generator) -> list[float | None]:
    """Return the reliability of each task's ranks, 0 to 1, (V,)."""
    halves: list[list[float]] = [[] for _ in bank.tasks]
    for _ in range(_SPLITS):
        first_DB = _random_half(bank.tokens_DB > 0, generator)
        other_DB = (bank.tokens_DB > 0) & ~first_DB
        first_DV, second_DV = _ratios(bank, first_DB), _ratios(bank, other_DB)
        for v, found in enumerate(halves):
            r = spearman(first_DV[:, v], second_DV[:, v])
            if r is not None:
                found.append(r)
    means = [float(np.mean(found)) if found else None for found in halves]
    return [None if r is None else 2 * max(r, 0.0) / (1 + max(r, 0.0)) for r in means]


def _random_half(measured_DB: NDArray[np.bool_], generator: np.random.Generator) -> Any:
    """Draw half of each domain's sub-batches."""
    order_DB = np.where(measured_DB, generator.random(measured_DB.shape), np.inf).argsort(axis=1)
    place_DB = order_DB.argsort(axis=1)
    return place_DB < (measured_DB.sum(axis=1, keepdims=True) // 2)


def _ratios(bank: SubBatchBank, chosen_DB: NDArray[np.bool_]) -> Array:
    """Return S_DV from the chosen sub-batches alone."""
    sums_DV = (bank.sums_DBV * chosen_DB[:, :, None]).sum(axis=1)
    ratios_DV: Array = sums_DV / (bank.tokens_DB * chosen_DB).sum(axis=1)[:, None]
    return ratios_DV
