import numpy as np
import pytest
from scipy.stats import spearmanr

from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.stability import rank_stability, spearman

D, B = 12, 16
DOMAINS = [f"d{d:02}" for d in range(D)]


def drawn(rng, truth_VD, noise, domains=DOMAINS, tasks=("t", "u")):
    values_DBV = truth_VD.T[:, None, :] + noise * rng.normal(size=(D, B, len(tasks)))
    return SubBatchBank(values_DBV * 64, np.full((D, B), 64.0), domains, list(tasks))


def test_spearman_is_scipys():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 5, (2, 9)).astype(float)
        assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert spearman(np.ones(5), np.arange(5.0)) is None
    assert spearman(np.arange(2.0), np.arange(2.0)) is None


@pytest.mark.parametrize("noise", [0.5, 2.0, 4.0])
def test_the_ceiling_is_the_correlation_of_draws_of_one_truth(noise):
    """Where nothing but noise changes, the correlation is at its ceiling on average."""
    rng = np.random.default_rng(1)
    truth_VD = rng.normal(size=(2, D))
    found = [
        rank_stability(drawn(rng, truth_VD, noise), drawn(rng, truth_VD, noise), rng)
        for _ in range(60)
    ]
    for task in ("t", "u"):
        seen = np.mean([one.correlation[task] for one in found])
        told = np.mean([one.ceiling[task] for one in found])
        assert told == pytest.approx(seen, abs=0.06)


def test_a_truth_that_moves_is_below_its_ceiling():
    rng = np.random.default_rng(2)
    before, after = (
        drawn(rng, rng.normal(size=(2, D)), 0.3),
        drawn(rng, rng.normal(size=(2, D)), 0.3),
    )
    found = rank_stability(before, after, rng)
    assert found.ceiling["t"] > 0.9
    assert found.correlation["t"] < 0.7


def test_only_what_both_boundaries_have_is_compared():
    rng = np.random.default_rng(3)
    truth_VD = rng.normal(size=(2, D))
    order = rng.permutation(D)
    before = drawn(rng, truth_VD, 0.0)
    after = drawn(rng, truth_VD[:, order], 0.0, [DOMAINS[d] for d in order], ("t", "other"))
    after.sums_DBV[0, 0, 0] = np.nan
    found = rank_stability(before, after, rng)
    assert found.correlation == {"t": pytest.approx(1.0)}


def test_few_domains_have_no_ranks_to_speak_of():
    rng = np.random.default_rng(4)
    bank = drawn(rng, rng.normal(size=(2, D)), 0.1)
    two = SubBatchBank(bank.sums_DBV[:2], bank.tokens_DB[:2], DOMAINS[:2], bank.tasks)
    assert rank_stability(two, two, rng).to_json() == {
        "correlation": {"t": None, "u": None},
        "ceiling": {"t": None, "u": None},
    }
