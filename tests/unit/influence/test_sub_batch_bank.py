"""The bank's estimates, against closed forms and simulation."""

import numpy as np
import pytest

from megatron_tikmix.influence.sub_batch_bank import SubBatchBank

DOMAINS, TASKS = ["a", "b"], ["t", "u", "v"]


def bank_of(values_DBV: np.ndarray, tokens_DB: np.ndarray) -> SubBatchBank:
    return SubBatchBank(values_DBV * tokens_DB[:, :, None], tokens_DB, DOMAINS, TASKS)


def test_equal_sub_batches_give_mean_and_standard_error_of_the_mean() -> None:
    values_DBV = np.random.default_rng(0).normal(size=(2, 10, 3))
    matrix = bank_of(values_DBV, np.full((2, 10), 64.0)).influence_matrix()
    np.testing.assert_allclose(matrix.values_VD, values_DBV.mean(axis=1).T, rtol=1e-12)
    expected = values_DBV.std(axis=1, ddof=1).T / np.sqrt(10)
    np.testing.assert_allclose(matrix.standard_error_VD, expected, rtol=1e-12)


def test_ragged_sub_batches_weigh_by_tokens() -> None:
    values_DBV = np.zeros((2, 8, 3))
    values_DBV[0, 0] = 4.0
    tokens_DB = np.ones((2, 8))
    tokens_DB[0, 0] = 9.0
    matrix = bank_of(values_DBV, tokens_DB).influence_matrix()
    assert matrix.values_VD[0, 0] == pytest.approx(4.0 * 9 / 16)
    assert matrix.values_VD[0, 1] == 0.0


def test_redrawn_matrices_spread_as_the_standard_error_says() -> None:
    generator = np.random.default_rng(1)
    bank = bank_of(generator.normal(size=(2, 12, 3)), np.full((2, 12), 7.0))
    draws = np.stack([bank.redrawn(generator).values_VD for _ in range(4000)])
    matrix = bank.influence_matrix()
    np.testing.assert_allclose(draws.std(axis=0), matrix.standard_error_VD, rtol=0.06)
    np.testing.assert_allclose(
        draws.mean(axis=0), matrix.values_VD, atol=4 * matrix.standard_error_VD.max() / 60
    )


def test_the_error_covers_the_truth_at_the_stated_rate() -> None:
    from scipy.stats import t

    generator = np.random.default_rng(2)
    covered = []
    for _ in range(600):
        bank = bank_of(1.0 + generator.normal(size=(2, 8, 3)), np.full((2, 8), 3.0))
        matrix = bank.influence_matrix()
        reach = t.ppf(0.975, 7) * matrix.standard_error_VD
        covered.append(np.abs(matrix.values_VD - 1.0) <= reach)
    assert 0.93 < np.mean(covered) < 0.97
