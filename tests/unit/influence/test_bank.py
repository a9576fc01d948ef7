"""The bank's estimates, against closed forms and simulation."""

import json

import numpy as np
import pytest

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank

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


# Different numbers of sub-batches, growing, keeping -----------------------------------------


def ragged_bank() -> tuple[SubBatchBank, list[np.ndarray], list[np.ndarray]]:
    """A bank of 9 and 14 sub-batches, and the same as plain lists."""
    generator = np.random.default_rng(3)
    tokens = [generator.integers(1, 9, size=n).astype(float) for n in (9, 14)]
    sums = [generator.normal(size=(len(t), 3)) * t[:, None] for t in tokens]
    tokens_DB, sums_DBV = np.zeros((2, 14)), np.zeros((2, 14, 3))
    for d in range(2):
        tokens_DB[d, : len(tokens[d])], sums_DBV[d, : len(tokens[d])] = tokens[d], sums[d]
    return SubBatchBank(sums_DBV, tokens_DB, DOMAINS, TASKS), sums, tokens


def test_domains_may_have_different_numbers_of_sub_batches() -> None:
    bank, sums, tokens = ragged_bank()
    assert bank.sub_batches_D.tolist() == [9, 14]
    assert bank.degrees_of_freedom_D.tolist() == [8, 13]
    matrix = bank.influence_matrix()
    assert matrix.standard_error_VD is not None
    for d, (sums_BV, tokens_B) in enumerate(zip(sums, tokens, strict=True)):
        alone = SubBatchBank(sums_BV[None], tokens_B[None], DOMAINS[d : d + 1], TASKS)
        expected = alone.influence_matrix()
        np.testing.assert_allclose(matrix.values_VD[:, d], expected.values_VD[:, 0], rtol=1e-12)
        np.testing.assert_allclose(
            matrix.standard_error_VD[:, d], expected.standard_error_VD[:, 0], rtol=1e-12
        )


def test_redrawn_matrices_of_a_ragged_bank_spread_as_its_errors_say() -> None:
    """Equal tokens, so that the bootstrap and the ratio's error estimate the same thing exactly."""
    bank, _, _ = ragged_bank()
    bank = SubBatchBank(bank.sums_DBV, np.where(bank.tokens_DB > 0, 5.0, 0.0), DOMAINS, TASKS)
    generator = np.random.default_rng(4)
    draws = np.stack([bank.redrawn(generator).values_VD for _ in range(4000)])
    np.testing.assert_allclose(
        draws.std(axis=0), bank.influence_matrix().standard_error_VD, rtol=0.06
    )


def test_extended_is_the_bank_of_all_sub_batches() -> None:
    whole, _, _ = ragged_bank()
    first = SubBatchBank(whole.sums_DBV[:, :3], whole.tokens_DB[:, :3], DOMAINS, TASKS)
    # Places that were not measured may lie anywhere.
    later = SubBatchBank(whole.sums_DBV[:, :2:-1], whole.tokens_DB[:, :2:-1], DOMAINS, TASKS)
    grown = first.extended(later)
    assert grown.sub_batches_D.tolist() == [9, 14]
    np.testing.assert_allclose(
        grown.influence_matrix().values_VD, whole.influence_matrix().values_VD, rtol=1e-12
    )
    np.testing.assert_allclose(
        grown.influence_matrix().standard_error_VD,
        whole.influence_matrix().standard_error_VD,
        rtol=1e-12,
    )
    with pytest.raises(ValueError, match="cannot be put together"):
        first.extended(SubBatchBank(later.sums_DBV, later.tokens_DB, ["a", "c"], TASKS))


def test_candidates_and_halves() -> None:
    bank, sums, tokens = ragged_bank()
    weights_ND = np.random.default_rng(5).dirichlet([1.0, 1.0], size=6)
    np.testing.assert_allclose(
        bank.candidate_influence(weights_ND), weights_ND @ bank.influence_matrix().values_VD.T
    )
    for start, half in enumerate(bank.halves()):
        means_DV = np.stack(
            [s[start::2].sum(axis=0) / t[start::2].sum() for s, t in zip(sums, tokens, strict=True)]
        )
        np.testing.assert_allclose(half.candidate_influence(weights_ND), weights_ND @ means_DV)


def test_json_gives_the_same_bits_back() -> None:
    bank, _, _ = ragged_bank()
    bank.sums_DBV[0, 2, 1] = np.inf
    bank = SubBatchBank(bank.sums_DBV, bank.tokens_DB, DOMAINS, TASKS, bad_tasks=["v"])
    text = json.dumps(bank.to_json(), allow_nan=False)
    again = SubBatchBank.from_json(json.loads(text))
    assert (again.domains, again.tasks, again.bad_tasks) == (("a", "b"), ("t", "u", "v"), ("v",))
    assert np.array_equal(again.tokens_DB, bank.tokens_DB)
    finite = np.isfinite(bank.sums_DBV)
    assert np.array_equal(again.sums_DBV[finite], bank.sums_DBV[finite])
    assert np.isnan(again.sums_DBV[~finite]).all()


def test_what_is_not_finite_is_left_out_and_named() -> None:
    bank, _, _ = ragged_bank()
    good = bank.influence_matrix()
    bank.sums_DBV[0, 4, :] = np.nan
    bank.sums_DBV[:, :, 1] = 0.0  # what a probe leaves of a task whose gradient is not finite
    bank = SubBatchBank(bank.sums_DBV, bank.tokens_DB, DOMAINS, TASKS, bad_tasks=["u"])
    assert bank.bad_domains == ("a",)
    matrix = bank.influence_matrix()
    assert (matrix.domains, matrix.tasks) == (("b",), ("t", "v"))
    np.testing.assert_array_equal(matrix.values_VD[:, 0], good.values_VD[[0, 2], 1])
    assert bank.usable().degrees_of_freedom_D.tolist() == [13]
    # A bad domain is no part of any comparison of candidates.
    np.testing.assert_allclose(
        bank.candidate_influence([[0.25, 0.75]]), 0.75 * matrix.values_VD.T, rtol=1e-12
    )
    nothing = SubBatchBank(np.full((2, 8, 3), np.nan), np.ones((2, 8)), DOMAINS, TASKS)
    with pytest.raises(InputError, match="no domain or no task"):
        nothing.influence_matrix()


def test_too_few_sub_batches_are_refused_by_name() -> None:
    bank, _, _ = ragged_bank()
    few = SubBatchBank(bank.sums_DBV[:, 2:], bank.tokens_DB[:, 2:], DOMAINS, TASKS)
    with pytest.raises(InputError, match="a have fewer than 8"):
        few.influence_matrix()
