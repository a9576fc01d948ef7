"""The sub-batch bank: from inner products to the influence matrix with its errors.

Group Influence of domain j on task i, in the benefit sign (positive: training on j lowers
i's loss), with every gradient a mean per unmasked token::

    S_ij = ∇f_iᵀ H⁻¹ ∇L_j = Σ_b sums[j, b, i] / Σ_b tokens[j, b]

where ``sums[j, b, i]`` is the inner product of task i's preconditioned gradient with the
*summed* gradient of sub-batch b of domain j.
"""

from dataclasses import dataclass

import numpy as np

from megatron_tikmix.mixing import InfluenceMatrix


@dataclass(frozen=True)
class SubBatchBank:
    """Inner products and token counts of one probe.

    Attributes:
        sums_DBV: inner products with summed sub-batch gradients, float64 (D, B, V).
        tokens_DB: unmasked tokens of each sub-batch, float64 (D, B).
        domains: names, D. tasks: names, V.
    """

    sums_DBV: np.ndarray
    tokens_DB: np.ndarray
    domains: list[str]
    tasks: list[str]

    def influence_matrix(self) -> InfluenceMatrix:
        """S_VD with the standard error of each entry.

        The error is that of a ratio of sums over B sub-batches (B ≥ 2), with the validation
        gradients taken as given: a t interval with B − 1 degrees of freedom.
        """
        B = self.tokens_DB.shape[1]
        S_DV = _ratio(self.sums_DBV, self.tokens_DB)
        residuals_DBV = self.sums_DBV - S_DV[:, None, :] * self.tokens_DB[:, :, None]
        variance_DV = B / (B - 1) * (residuals_DBV**2).sum(axis=1)
        error_DV = np.sqrt(variance_DV) / self.tokens_DB.sum(axis=1)[:, None]
        return InfluenceMatrix(
            S_DV.T, domains=self.domains, tasks=self.tasks, standard_error_VD=error_DV.T
        )

    def redrawn(self, generator: np.random.Generator) -> InfluenceMatrix:
        """S_VD of a bootstrap draw of each domain's sub-batches: how much a decision owes to noise.

        Residuals are scaled by √(B / (B − 1)), since B draws with replacement vary that much less
        than B fresh sub-batches would.
        """
        D, B = self.tokens_DB.shape
        picks_DB = generator.integers(0, B, size=(D, B))
        rows_D1 = np.arange(D)[:, None]
        drawn = _ratio(self.sums_DBV[rows_D1, picks_DB], self.tokens_DB[rows_D1, picks_DB])
        centre = _ratio(self.sums_DBV, self.tokens_DB)
        values = centre + np.sqrt(B / (B - 1)) * (drawn - centre)
        return InfluenceMatrix(values.T, domains=self.domains, tasks=self.tasks)


def _ratio(sums_DBV: np.ndarray, tokens_DB: np.ndarray) -> np.ndarray:
    """S_DV = Σ_b sums / Σ_b tokens."""
    S_DV: np.ndarray = sums_DBV.sum(axis=1) / tokens_DB.sum(axis=1)[:, None]
    return S_DV
