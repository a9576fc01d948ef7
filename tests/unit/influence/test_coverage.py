"""The 95% intervals on data as unkind as a corpus is: heavy tails, ragged lengths."""

import numpy as np
from scipy.stats import t as students_t

from megatron_tikmix.influence.bank import MIN_SUB_BATCHES, SubBatchBank

PROBES, D, ROWS = 200, 20, 32


def test_intervals_cover_heavy_tailed_ragged_samples() -> None:
    """200 probes of 8 sub-batches of 32 rows of 4 to 128 tokens; influence by token falls with a
    row's length, and varies with three degrees of freedom from row to row."""
    generator = np.random.default_rng(4)
    lengths = np.arange(4, 129)
    truth = float((lengths * level(lengths)).sum() / lengths.sum())
    domains = [f"domain{d}" for d in range(D)]
    inside = []
    for _ in range(PROBES):
        tokens_DBR = generator.choice(lengths, size=(D, MIN_SUB_BATCHES, ROWS))
        noise_DBR = 3.0 * generator.standard_t(3, size=tokens_DBR.shape)
        sums_DBR = tokens_DBR * (level(tokens_DBR) + noise_DBR)
        bank = SubBatchBank(
            sums_DBR.sum(axis=2)[:, :, None], tokens_DBR.sum(axis=2), domains, ["t"]
        )
        matrix = bank.influence_matrix()
        assert matrix.standard_error_VD is not None
        reach_VD = students_t.ppf(0.975, bank.degrees_of_freedom_D) * matrix.standard_error_VD
        inside.append(np.abs(matrix.values_VD - truth) <= reach_VD)
    assert 0.92 <= np.mean(inside) <= 0.98


def level(tokens: np.ndarray) -> np.ndarray:
    """Mean influence by token of a row of this length."""
    return 1.0 + 20.0 / tokens
