"""The sub-batch bank: inner products, from which the influence matrix and its errors follow.

Group Influence of domain j on task i, in the benefit sign (positive: training on j lowers
i's loss), with every gradient a mean per unmasked token::

    S_ij = ∇f_iᵀ H⁻¹ ∇L_j = Σ_b sums[j, b, i] / Σ_b tokens[j, b]

where ``sums[j, b, i]`` is the inner product of task i's preconditioned gradient with the
*summed* gradient of sub-batch b of domain j.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix

Array = NDArray[np.float64]

MIN_SUB_BATCHES = 8
"""The fewest sub-batches of a domain that give a reliable standard error."""


@dataclass(frozen=True, eq=False)
class SubBatchBank:
    """The inner products and token counts of one probe.

    Domains may have different numbers of sub-batches: the arrays are padded to the largest number,
    B, and an entry with 0 tokens was not measured. A domain with a sub-batch that is not finite,
    and a task whose gradient is not finite, are *bad*, and left out of all results.

    Attributes:
        sums_DBV: inner products with summed sub-batch gradients, float64 (D, B, V).
        tokens_DB: unmasked tokens of each sub-batch, float64 (D, B).
        domains: D names.
        tasks: V names.
        bad_tasks: names of tasks whose gradient was not finite.
    """

    sums_DBV: Array
    tokens_DB: Array
    domains: Sequence[str]
    tasks: Sequence[str]
    bad_tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in ("domains", "tasks", "bad_tasks"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("sums_DBV", "tokens_DB"):
            object.__setattr__(self, field, np.asarray(getattr(self, field), dtype=np.float64))
        D, B, V = self.sums_DBV.shape
        if self.tokens_DB.shape != (D, B) or (len(self.domains), len(self.tasks)) != (D, V):
            raise ValueError(
                f"bank: sums {self.sums_DBV.shape}, tokens {self.tokens_DB.shape}, "
                f"{len(self.domains)} domains and {len(self.tasks)} tasks do not fit"
            )

    # Measurements -----------------------------------------------------------------------

    @property
    def sub_batches_D(self) -> NDArray[np.int64]:
        """Number of measured sub-batches of each domain, (D,)."""
        return (self.tokens_DB > 0).sum(axis=1)

    @property
    def degrees_of_freedom_D(self) -> NDArray[np.int64]:
        """Degrees of freedom of each domain's standard errors, B_j − 1, (D,)."""
        return self.sub_batches_D - 1

    @property
    def bad_domains(self) -> tuple[str, ...]:
        """Domains with a sub-batch that is not finite, on tasks whose gradient is."""
        rows = zip(self.domains, self._good_tasks().sums_DBV, strict=True)
        return tuple(name for name, sums_BV in rows if not np.isfinite(sums_BV).all())

    def usable(self) -> "SubBatchBank":
        """Return the bank without bad domains and tasks; it may be empty."""
        bank, bad = self._good_tasks(), self.bad_domains
        if not bad:
            return bank
        good = [d for d, name in enumerate(self.domains) if name not in bad]
        return SubBatchBank(
            bank.sums_DBV[good], bank.tokens_DB[good], [self.domains[d] for d in good], bank.tasks
        )

    def _good_tasks(self) -> "SubBatchBank":
        if not self.bad_tasks:
            return self
        good = [v for v, name in enumerate(self.tasks) if name not in self.bad_tasks]
        return SubBatchBank(
            self.sums_DBV[:, :, good], self.tokens_DB, self.domains, [self.tasks[v] for v in good]
        )

    def of_tasks(self, tasks: Sequence[str]) -> "SubBatchBank":
        """Return the bank with only those of its tasks that are named, in its own order."""
        kept = [v for v, name in enumerate(self.tasks) if name in tasks]
        return SubBatchBank(
            self.sums_DBV[:, :, kept],
            self.tokens_DB,
            self.domains,
            [self.tasks[v] for v in kept],
            [name for name in self.bad_tasks if name in tasks],
        )

    # Estimates --------------------------------------------------------------------------

    def influence_matrix(self) -> InfluenceMatrix:
        """Return S_VD of the usable domains and tasks, with the standard error of each entry.

        The error is that of a ratio of sums over B_j sub-batches, with the validation
        gradients taken as exact: a t interval with B_j − 1 degrees of freedom.

        Raises:
            InputError: nothing is usable, or a domain has fewer than 8 sub-batches.
        """
        bank = self._measured()
        B_D = bank.sub_batches_D
        few = [name for name, B in zip(bank.domains, B_D, strict=True) if B < MIN_SUB_BATCHES]
        if few:
            raise InputError(
                f"influence: {', '.join(few)} have fewer than {MIN_SUB_BATCHES} sub-batches with "
                f"unmasked tokens; standard errors need that many"
            )
        S_DV = bank._ratio(bank.sums_DBV, bank.tokens_DB)
        residuals_DBV = bank.sums_DBV - S_DV[:, None, :] * bank.tokens_DB[:, :, None]
        variance_DV = (B_D / (B_D - 1))[:, None] * (residuals_DBV**2).sum(axis=1)
        error_DV = np.sqrt(variance_DV) / bank.tokens_DB.sum(axis=1)[:, None]
        return InfluenceMatrix(
            S_DV.T,
            domains=bank.domains,
            tasks=bank.tasks,
            standard_error_VD=error_DV.T,
            degrees_of_freedom=float(B_D.min() - 1),
        )

    def redrawn(self, generator: np.random.Generator) -> InfluenceMatrix:
        """Return S_VD of a bootstrap draw of each domain's sub-batches.

        Decisions on such draws show the effect of noise. Residuals are scaled by
        √(B_j / (B_j − 1)), since B_j draws with replacement vary that much less than B_j fresh
        sub-batches.
        """
        bank = self._measured()
        D, B = bank.tokens_DB.shape
        B_D1 = bank.sub_batches_D[:, None]
        picks_DB = generator.integers(0, B_D1, size=(D, B))
        drawn_DB = np.arange(B) < B_D1
        rows_D1 = np.arange(D)[:, None]
        drawn_DV = bank._ratio(
            bank.sums_DBV[rows_D1, picks_DB] * drawn_DB[:, :, None],
            bank.tokens_DB[rows_D1, picks_DB] * drawn_DB,
        )
        centre_DV = bank._ratio(bank.sums_DBV, bank.tokens_DB)
        values_DV = centre_DV + np.sqrt(B_D1 / (B_D1 - 1)) * (drawn_DV - centre_DV)
        return InfluenceMatrix(values_DV.T, domains=bank.domains, tasks=bank.tasks)

    def candidate_influence(self, weights_ND: ArrayLike) -> Array:
        """Return the influence of N mixtures on the usable tasks, float64 (N, V), without a pass.

        The gradient of a mixture is the mean of its domains' gradients, weighted by its weights
        over tokens. Bad domains contribute nothing, so compare only mixtures that give them the
        same weight. For a prediction and a measurement on independent samples, use one of the
        :meth:`halves` for each.

        Args:
            weights_ND: weights of `domains`, in their order.
        """
        bank = self._measured()
        columns = [self.domains.index(name) for name in bank.domains]
        weights = np.asarray(weights_ND, dtype=np.float64)[:, columns]
        influence_NV: Array = weights @ bank._ratio(bank.sums_DBV, bank.tokens_DB)
        return influence_NV

    def halves(self) -> tuple["SubBatchBank", "SubBatchBank"]:
        """Return two banks of alternate sub-batches of each domain: no sample is in both."""
        bank = self._compact()
        even, odd = (bank._of(slice(start, None, 2)) for start in (0, 1))
        return even, odd

    @staticmethod
    def _ratio(sums_DBV: Array, tokens_DB: Array) -> Array:
        """Return S_DV = Σ_b sums / Σ_b tokens."""
        S_DV: Array = sums_DBV.sum(axis=1) / tokens_DB.sum(axis=1)[:, None]
        return S_DV

    def _measured(self) -> "SubBatchBank":
        """Return the usable part of the bank, each domain's measured sub-batches first.

        Raises:
            InputError: there is none, or a domain has no unmasked token.
        """
        bank = self.usable()
        if not bank.domains or not bank.tasks:
            raise InputError(
                "influence: no domain or no task has a finite gradient; look at the losses"
            )
        for name, B in zip(bank.domains, bank.sub_batches_D, strict=True):
            if B == 0:
                raise InputError(f"influence: the probe of domain {name} has no unmasked token")
        return bank._compact()

    def _compact(self) -> "SubBatchBank":
        """Return the bank with each domain's measured sub-batches first."""
        order_DB = np.argsort(self.tokens_DB <= 0, axis=1, kind="stable")
        rows_D1 = np.arange(len(self.domains))[:, None]
        return SubBatchBank(
            self.sums_DBV[rows_D1, order_DB],
            self.tokens_DB[rows_D1, order_DB],
            self.domains,
            self.tasks,
            self.bad_tasks,
        )

    def _of(self, sub_batches: slice) -> "SubBatchBank":
        return SubBatchBank(
            self.sums_DBV[:, sub_batches],
            self.tokens_DB[:, sub_batches],
            self.domains,
            self.tasks,
            self.bad_tasks,
        )

    # Growing and keeping ----------------------------------------------------------------

    def extended(self, other: "SubBatchBank") -> "SubBatchBank":
        """Return this bank with the sub-batches of another one added.

        Raises:
            ValueError: the other bank has other domains or tasks.
        """
        names, other_names = (
            (bank.domains, bank.tasks, sorted(bank.bad_tasks)) for bank in (self, other)
        )
        if names != other_names:
            raise ValueError(f"banks of {names} and of {other_names} cannot be put together")
        whole = SubBatchBank(
            np.concatenate([self.sums_DBV, other.sums_DBV], axis=1),
            np.concatenate([self.tokens_DB, other.tokens_DB], axis=1),
            self.domains,
            self.tasks,
            self.bad_tasks,
        )._compact()
        return whole._of(slice(0, int(whole.sub_batches_D.max(initial=0))))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the ledger: each sub-batch's tokens and sums, by domain.

        Numbers that are not finite become None.
        """
        bank = self._compact()
        return {
            "tasks": list(bank.tasks),
            "bad_tasks": list(bank.bad_tasks),
            "bad_domains": list(bank.bad_domains),
            "domains": {
                name: {
                    "tokens": bank.tokens_DB[d, :B].tolist(),
                    "sums": [[_or_none(x) for x in row] for row in bank.sums_DBV[d, :B].tolist()],
                }
                for d, (name, B) in enumerate(zip(bank.domains, bank.sub_batches_D, strict=True))
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SubBatchBank":
        """Undo :meth:`to_json`, to the bit; numbers that were not finite become NaN."""
        domains = list(data["domains"])
        B = max((len(entry["tokens"]) for entry in data["domains"].values()), default=0)
        sums_DBV = np.zeros((len(domains), B, len(data["tasks"])))
        tokens_DB = np.zeros((len(domains), B))
        for d, entry in enumerate(data["domains"].values()):
            for b, (tokens, sums) in enumerate(zip(entry["tokens"], entry["sums"], strict=True)):
                tokens_DB[d, b] = tokens
                sums_DBV[d, b] = [np.nan if x is None else x for x in sums]
        return cls(sums_DBV, tokens_DB, domains, data["tasks"], data["bad_tasks"])


def _or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
