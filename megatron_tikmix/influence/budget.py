"""How far noise moves a decision, and which further sub-batches would reduce that.

The influence matrix is an estimate, so the mixture solved on it is one too. To find how far noise
alone moves it, each domain's sub-batches are redrawn (a bootstrap) and the mixture is solved again.
With `probe.precision` the probe grows until that distance is small or the tokens are spent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import MIN_SUB_BATCHES, SubBatchBank
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture

Array = NDArray[np.float64]
Solve = Callable[[InfluenceMatrix], Mixture]

QUANTILE = 0.95
_REDRAWS = 40
_REDRAWS_OF_MANY = 10  # above so many domains a solution takes long:
_MANY = 200

GROWTH = 0.5
"""The sub-batches grow by this share of their number at a time."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """The effect of noise on the solved mixture.

    Attributes:
        mixture: solved on the measured bank.
        total_variation: 95% of the mixtures solved on redrawn banks are at most this far from it.
    """

    mixture: Mixture
    total_variation: float


def sensitivity(bank: SubBatchBank, solve: Solve, generator: np.random.Generator) -> Sensitivity:
    """Solve on the bank and on redraws of it, and return how far the mixtures differ."""
    measured = bank.influence_matrix()
    mixture = solve(measured)
    distances = []
    for _ in range(_REDRAWS if len(mixture) <= _MANY else _REDRAWS_OF_MANY):
        drawn = replace(
            bank.redrawn(generator),
            # A redraw has the errors of the measured matrix.
            standard_error_VD=measured.standard_error_VD,
            degrees_of_freedom=measured.degrees_of_freedom,
        )
        distances.append(solve(drawn).total_variation(mixture))
    return Sensitivity(mixture, float(np.quantile(distances, QUANTILE)))


def importance(
    bank: SubBatchBank, mixture: Mixture, task_weights: Mapping[str, float]
) -> dict[str, float]:
    """Return how far the noise in each usable domain's influence moves the mixture, by name.

    Without constraints the entropic mixture is w_j ∝ exp(s_j/γ), s_j a domain's gain over all
    tasks. If s_j moves by δ, the mixture moves by w_j (1 − w_j) δ/γ in total variation; δ is here
    the standard error of s_j. Only ratios matter, so the common factor 1/γ is left out.
    """
    usable = bank.usable()
    matrix = bank.influence_matrix()
    weights_V = np.array([task_weights[task] for task in usable.tasks]) / matrix.scale_V
    gains = SubBatchBank(
        (usable.sums_DBV @ weights_V)[:, :, None], usable.tokens_DB, usable.domains, ["gain"]
    )
    errors_VD = gains.influence_matrix().standard_error_VD
    assert errors_VD is not None
    return {
        name: mixture[name] * (1 - mixture[name]) * error
        for name, error in zip(usable.domains, errors_VD[0].tolist(), strict=True)
    }


class AdaptiveBudget:
    """Asks for sub-batches where they matter, until the mixture is settled; on the main rank only.

    When noise moves the mixture by at most `precision`, that is confirmed first: a rule that checks
    the noise repeatedly stops when it happens to look small. Fresh sub-batches that the rule has
    not seen are added, and must move the mixture by no more than `precision`.

    Args:
        precision: total variation, 0 to 1.
        solve: returns the mixture for an influence matrix.
        task_weights: the weight of each task, by name.
        generator: draws the redraws.
    """

    def __init__(
        self,
        precision: float,
        solve: Solve,
        task_weights: Mapping[str, float],
        generator: np.random.Generator,
    ) -> None:
        self._precision = precision
        self._solve = solve
        self._task_weights = task_weights
        self._generator = generator
        self._to_confirm: Mixture | None = None
        self.confirmed = False

    def more(self, bank: SubBatchBank, affordable: int) -> NDArray[np.int64]:
        """Return how many further sub-batches each domain needs, int64 (D,); all 0 when done.

        Args:
            affordable: the most sub-batches that may still be added, over all domains.
        """
        nothing_D = np.zeros(len(bank.domains), dtype=np.int64)
        if not bank.usable().domains or not bank.usable().tasks:
            return nothing_D
        try:
            found = sensitivity(bank, self._solve, self._generator)
        except InputError:  # there is no mixture to settle; the decision will give the reason
            return nothing_D
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
        matters = importance(bank, found.mixture, self._task_weights)
        moves_D = np.array([matters.get(name, 0.0) for name in bank.domains])
        added = min(int(np.ceil(GROWTH * bank.sub_batches_D[usable_D].sum())), affordable)
        return apportion(added, shortfall(bank.sub_batches_D, moves_D, added))


def shortfall(sub_batches_D: NDArray[np.int64], moves_D: Array, added: int) -> Array:
    """Return how many sub-batches each domain lacks of its best share when `added` are added, (D,).

    Neyman's allocation: for a given total, noise moves the mixture least when a domain's share of
    the sub-batches is proportional to the effect of a single one, which is moves · √(sub-batches).
    """
    single_D = moves_D * np.sqrt(sub_batches_D)
    if single_D.sum() <= 0:
        return single_D
    best_D = (sub_batches_D.sum() + added) * single_D / single_D.sum()
    return np.maximum(best_D - sub_batches_D, 0.0)


def apportion(total: int, importance_D: Array) -> NDArray[np.int64]:
    """Divide `total` sub-batches in proportion to importance, int64 (D,), with exactly that sum."""
    if total <= 0 or importance_D.sum() <= 0:
        return np.zeros(len(importance_D), dtype=np.int64)
    exact_D = total * importance_D / importance_D.sum()
    shares_D = np.floor(exact_D).astype(np.int64)
    order = np.argsort(shares_D - exact_D, kind="stable")
    shares_D[order[: total - int(shares_D.sum())]] += 1
    return shares_D
