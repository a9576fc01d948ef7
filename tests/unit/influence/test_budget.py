"""Sensitivity to noise, and the adaptive budget, on banks drawn from a known truth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.budget import (
    AdaptiveBudget,
    apportion,
    importance,
    sensitivity,
    shortfall,
)
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from tests.solving import limited, solve_d

DOMAINS, TASKS = ["a", "b", "c", "d"], ["t", "u"]
WEIGHTS = dict.fromkeys(TASKS, 1.0)
TRUTH_VD = np.array([[1.0, 0.6, 0.2, 0.0], [0.3, 1.0, 0.4, 0.1]])
FREE = limited(max_total_variation=None, pareto=False)


def solve(influence: InfluenceMatrix) -> Mixture:
    return solve_d(influence, Mixture.uniform(DOMAINS), constraints=FREE).mixture


def drawn(rng, counts_D, noise_D):
    """A bank with so many sub-batches of each domain, each scattered by its own noise."""
    B = max(counts_D)
    values_DBV = TRUTH_VD.T[:, None, :] + np.asarray(noise_D)[:, None, None] * rng.normal(
        size=(4, B, 2)
    )
    tokens_DB = 64.0 * (np.arange(B) < np.asarray(counts_D)[:, None])
    return SubBatchBank(values_DBV * tokens_DB[:, :, None], tokens_DB, DOMAINS, TASKS)


def test_sensitivity_is_how_far_fresh_probes_fall_apart():
    rng = np.random.default_rng(0)
    noise_D, truth = [0.3] * 4, solve(InfluenceMatrix(TRUTH_VD, domains=DOMAINS, tasks=TASKS))
    banks = [drawn(rng, [16] * 4, noise_D) for _ in range(40)]
    told = [sensitivity(bank, solve, rng).total_variation for bank in banks]
    seen = [solve(bank.influence_matrix()).total_variation(truth) for bank in banks]
    assert np.mean(told) == pytest.approx(np.quantile(seen, 0.95), rel=0.35)


def test_importance_is_how_far_redraws_of_one_domain_alone_move_the_mixture():
    rng = np.random.default_rng(1)
    noise_D = [0.05, 0.1, 0.2, 0.8]
    bank = drawn(rng, [64] * 4, noise_D)
    told = importance(bank, solve(bank.influence_matrix()), WEIGHTS)
    free = {"alpha": 0.0, "constraints": FREE}

    def solved(values_VD):
        influence = InfluenceMatrix(values_VD, domains=DOMAINS, tasks=TASKS)
        return solve_d(influence, Mixture.uniform(DOMAINS), **free).mixture

    seen = {}
    for d, name in enumerate(DOMAINS):
        moved = []
        for _ in range(100):
            values_VD = TRUTH_VD.copy()
            values_VD[:, d] += noise_D[d] / 8 * rng.normal(size=2)
            moved.append(solved(values_VD).total_variation(solved(TRUTH_VD)))
        seen[name] = np.mean(moved)
    for name in DOMAINS:
        expected = seen[name] / sum(seen.values())
        assert told[name] / sum(told.values()) == pytest.approx(expected, abs=0.12)


def grown(rng, precision, noise_D, affordable=100_000):
    budget = AdaptiveBudget(precision, solve, WEIGHTS, rng)
    counts_D, bank = np.full(4, 8), drawn(rng, [8] * 4, noise_D)
    for _ in range(60):
        more_D = budget.more(bank, affordable - int(counts_D.sum()))
        assert (more_D >= 0).all()
        assert counts_D.sum() + more_D.sum() <= max(affordable, 32)
        if not more_D.any():
            return budget, bank, counts_D
        counts_D = counts_D + more_D
        bank = bank.extended(drawn(rng, more_D.tolist(), noise_D))
    pytest.fail("it never stops")


def test_it_goes_on_until_the_mixture_is_where_a_large_sample_has_it():
    truth = solve(InfluenceMatrix(TRUTH_VD, domains=DOMAINS, tasks=TASKS))
    off, confirmed = [], []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        budget, bank, counts_D = grown(rng, 0.03, [0.3, 0.3, 0.3, 0.3])
        off.append(solve(bank.influence_matrix()).total_variation(truth))
        confirmed.append(budget.confirmed)
        assert counts_D.sum() > 8 * 4
    assert all(confirmed)
    assert np.quantile(off, 0.9) <= 0.03 * 1.2


def test_sub_batches_go_where_the_noise_is():
    rng = np.random.default_rng(3)
    _, _, counts_D = grown(rng, 0.03, [0.1, 0.6, 0.1, 0.1])
    assert counts_D[1] > 2 * counts_D[[0, 2, 3]].max()


def test_a_quiet_bank_is_confirmed_on_a_fresh_batch_first():
    rng = np.random.default_rng(4)
    budget, _, counts_D = grown(rng, 0.2, [0.01] * 4)
    assert budget.confirmed
    assert counts_D.tolist() == [16] * 4


def test_a_fresh_batch_that_disagrees_is_believed():
    rng = np.random.default_rng(5)
    budget = AdaptiveBudget(0.05, solve, WEIGHTS, rng)
    lucky = drawn(rng, [8] * 4, [0.0] * 4)
    fresh_D = budget.more(lucky, 10_000)
    assert fresh_D.tolist() == [8] * 4
    other = SubBatchBank(
        drawn(rng, [8] * 4, [0.0] * 4).sums_DBV[::-1], lucky.tokens_DB, DOMAINS, TASKS
    )
    assert budget.more(lucky.extended(other), 10_000).any()
    assert not budget.confirmed


def test_what_cannot_be_afforded_is_not_asked_for():
    rng = np.random.default_rng(6)
    budget, bank, counts_D = grown(rng, 0.001, [0.5] * 4, affordable=50)
    assert counts_D.sum() <= 50
    assert not budget.confirmed
    assert sensitivity(bank, solve, rng).total_variation > 0.001


def test_bad_domains_get_none():
    rng = np.random.default_rng(7)
    bank = drawn(rng, [8] * 4, [0.5] * 4)
    bank.sums_DBV[2, 0, 0] = np.nan

    def solve_usable(influence):
        prior = Mixture.uniform(influence.domains)
        return solve_d(influence, prior, constraints=FREE).mixture

    more_D = AdaptiveBudget(0.001, solve_usable, WEIGHTS, rng).more(bank, 1000)
    assert more_D[2] == 0
    assert more_D.sum() > 0


@given(st.integers(0, 200), st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=10))
def test_whole_sub_batches_are_shared_out_in_proportion(total, importance):
    importance_D = np.array(importance)
    shares_D = apportion(total, importance_D)
    if importance_D.sum() > 0:
        assert shares_D.sum() == total
        assert (abs(shares_D - total * importance_D / importance_D.sum()) < 1).all()
    else:
        assert not shares_D.any()


def test_neymans_allocation_is_the_best_of_a_fine_grid():
    """Two domains: what is left of the variance, Σ σ²/n, over all ways to add 20 sub-batches."""
    counts_D, single_D = np.array([8, 12]), np.array([1.0, 3.0])
    moves_D = single_D / np.sqrt(counts_D)
    more_D = apportion(20, shortfall(counts_D, moves_D, 20))
    left = [(single_D**2 / (counts_D + np.array([k, 20 - k]))).sum() for k in range(21)]
    assert more_D[0] == pytest.approx(int(np.argmin(left)), abs=1)
