"""How much a decision owes to noise, and where further sub-batches would lessen that.

The influence matrix is an estimate, so the mixture solved on it is one too. How far noise alone
moves it is found by redrawing each domain's sub-batches (a bootstrap) and solving again. With
`probe.precision` the probe grows until that distance is small, or the tokens are spent.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.influence.sub_batch_bank import MIN_SUB_BATCHES, SubBatchBank
from megatron_tikmix.mixing import InfluenceMatrix, Mixture

Array = NDArray[np.float64]
Solve = Callable[[InfluenceMatrix], Mixture]

QUANTILE = 0.95
_REDRAWS = 40
_REDRAWS_OF_MANY = 10  # above so many domains a solution takes long:
_MANY = 200

GROWTH = 0.5
"""By so much of what there is the sub-batches grow at a time."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What noise does to the mixture solved.

    Attributes:
        mixture: solved on the bank as it is.
        total_variation: 95% of the mixtures solved on redrawn banks are within so much of it.
        moves: by domain, the mean absolute change of its weight.
    """

    mixture: Mixture
    total_variation: float
    moves: dict[str, float]


def sensitivity(bank: SubBatchBank, solve: Solve, generator: np.random.Generator) -> Sensitivity:
    """Solve on the bank, and on redraws of it."""
    mixture = solve(bank.influence_matrix())
    redraws = _REDRAWS if len(mixture) <= _MANY else _REDRAWS_OF_MANY
    drawn = [solve(bank.redrawn(generator)) for _ in range(redraws)]
    distances = [mixture.total_variation(other) for other in drawn]
    moved_D = np.abs([other.array(mixture.domains) - mixture.array() for other in drawn]).mean(0)
    return Sensitivity(
        mixture,
        float(np.quantile(distances, QUANTILE)),
        dict(zip(mixture.domains, moved_D.tolist(), strict=True)),
    )


class AdaptiveBudget:
    """Asks for sub-batches where they matter, until the mixture is settled; on the main rank only.

    A bank whose mixture noise moves by at most `precision` is not believed at once: having looked
    at the noise again and again, one stops where it happens to look small. A fresh batch that the
    stopping rule has not seen is added first, and must leave the mixture where it was, within
    `precision`.

    Args:
        precision: total variation, 0 to 1.
        solve: the decision as a function of the influence.
        generator: of the redraws.
    """

    def __init__(self, precision: float, solve: Solve, generator: np.random.Generator) -> None:
        self._precision = precision
        self._solve = solve
        self._generator = generator
        self._to_confirm: Mixture | None = None
        self.confirmed = False
        self.latest: Sensitivity | None = None

    def more(self, bank: SubBatchBank, affordable: int) -> NDArray[np.int64]:
        """Further sub-batches of each of the bank's domains, int64 (D,); none when it is done.

        Args:
            affordable: how many sub-batches may still be added, over all domains.
        """
        self.latest = found = sensitivity(bank, self._solve, self._generator)
        nothing_D = np.zeros(len(bank.domains), dtype=np.int64)
        if self._to_confirm is not None:
            moved = found.mixture.total_variation(self._to_confirm)
            self.confirmed = max(moved, found.total_variation) <= self._precision
            if self.confirmed:
                return nothing_D
            self._to_confirm = None
        usable_D = np.array([name not in bank.bad_domains for name in bank.domains])
        if found.total_variation <= self._precision:
            self._to_confirm = found.mixture
            fresh_D = np.maximum(MIN_SUB_BATCHES, -(-bank.sub_batches_D // 2)) * usable_D
            return fresh_D if fresh_D.sum() <= affordable else nothing_D
        moves_D = np.array([found.moves.get(name, 0.0) for name in bank.domains]) * usable_D
        added = min(int(np.ceil(GROWTH * bank.sub_batches_D[usable_D].sum())), affordable)
        return shared_out(added, lacking(bank.sub_batches_D, moves_D, added))


def lacking(sub_batches_D: NDArray[np.int64], moves_D: Array, added: int) -> Array:
    """By how much each domain falls short of its best share of a larger total, (D,).

    Neyman's allocation: noise moves the mixture least, for a given total, when sub-batches are in
    proportion to what a single one of each domain moves it by, which is moves · √(sub-batches).
    """
    single_D = moves_D * np.sqrt(sub_batches_D)
    if single_D.sum() <= 0:
        return single_D
    best_D = (sub_batches_D.sum() + added) * single_D / single_D.sum()
    return np.maximum(best_D - sub_batches_D, 0.0)


def shared_out(total: int, importance_D: Array) -> NDArray[np.int64]:
    """`total` whole sub-batches in proportion to importance, int64 (D,); the sum is kept."""
    if total <= 0 or importance_D.sum() <= 0:
        return np.zeros(len(importance_D), dtype=np.int64)
    exact_D = total * importance_D / importance_D.sum()
    shares_D = np.floor(exact_D).astype(np.int64)
    order = np.argsort(shares_D - exact_D, kind="stable")
    shares_D[order[: total - int(shares_D.sum())]] += 1
    return shares_D
