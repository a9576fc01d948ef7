from pathlib import Path

import lightgbm
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from scipy.stats import spearmanr

from megatron_tikmix.errors import InputError
from megatron_tikmix.solve.surrogate import LogRidge, MixingLaw, MixtureSurrogate, _logarithms

REGMIX = Path(__file__).parents[3] / "benchmarks" / "data" / "regmix"


def saturating(weights_ND, tasks=2, seed=0):
    """Gains that saturate in each weight, (N, V)."""
    rng = np.random.default_rng(seed)
    worth_VD = rng.exponential(size=(tasks, weights_ND.shape[1]))
    return (1 - np.exp(-6 * weights_ND)) @ worth_VD.T


def mixtures(count, domains, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(domains), count)


def r2(predicted_NV, outcomes_NV):
    residual_NV = predicted_NV - outcomes_NV
    return 1 - (residual_NV**2).mean(axis=0) / outcomes_NV.var(axis=0)


def test_few_candidates_teach_it_a_saturating_gain():
    # LightGBM as it comes cannot split fewer than 40 candidates: it predicts their mean.
    weights_ND, unseen_ND = mixtures(36, 8, seed=1), mixtures(500, 8, seed=2)
    outcomes_NV, truth_NV = saturating(weights_ND), saturating(unseen_ND)
    ours_NV = MixtureSurrogate().fit(weights_ND, outcomes_NV).predict(unseen_ND)
    assert (r2(ours_NV, truth_NV) > 0.85).all()
    default = lightgbm.train(
        {"verbosity": -1, "num_threads": 1}, lightgbm.Dataset(weights_ND, outcomes_NV[:, 0])
    ).predict(unseen_ND)
    assert r2(default, truth_NV[:, 0]) < 0.1


def test_on_real_runs_128_do_better_than_256_with_the_settings_of_regmix():
    table = [
        np.genfromtxt(REGMIX / name, delimiter=",", skip_header=1)[:, 1:]
        for name in ("train_mixture_1m.csv", "train_pile_loss_1m.csv")
    ]
    order = np.random.default_rng(3).permutation(512)
    fitted, test = order[:256], order[256:]
    weights_ND, losses_NV = table[0], table[1][:, ::3]  # every third task, for speed
    ours_NV = (
        MixtureSurrogate()
        .fit(weights_ND[fitted[:128]], losses_NV[fitted[:128]])
        .predict(weights_ND[test])
    )
    for v, loss_N in enumerate(losses_NV.T):
        data = lightgbm.Dataset(weights_ND[fitted], loss_N[fitted])
        regmix = {"learning_rate": 0.01, "verbosity": -1, "num_threads": 1}
        theirs_N = lightgbm.train(regmix, data, 1000).predict(weights_ND[test])
        ours = spearmanr(ours_NV[:, v], loss_N[test]).statistic
        assert ours > 0.96
        assert ours > spearmanr(theirs_N, loss_N[test]).statistic - 0.005


def test_trees_learn_what_has_no_smooth_shape():
    weights_ND, unseen_ND = mixtures(300, 5, seed=3), mixtures(500, 5, seed=4)

    def cliff(weights_ND):
        return saturating(weights_ND, 1) + 2.0 * (weights_ND[:, :1] > 0.25)

    with_trees, without = (
        r2(
            MixtureSurrogate(max_trees=n).fit(weights_ND, cliff(weights_ND)).predict(unseen_ND),
            cliff(unseen_ND),
        )
        for n in (400, 0)
    )
    assert 1 - with_trees < 0.5 * (1 - without)


def test_noise_is_not_learnt():
    weights_ND = mixtures(48, 12, seed=5)
    noise_NV = np.random.default_rng(6).normal(size=(48, 4))
    surrogate = MixtureSurrogate()
    predicted_NV = surrogate.fit(weights_ND, noise_NV).predict(mixtures(500, 12, seed=7))
    assert (predicted_NV.std(axis=0) / noise_NV.std(axis=0)).mean() < 0.5
    assert surrogate.cross_validate(weights_ND, noise_NV).r2_V.mean() < 0.1


@pytest.mark.parametrize("rising", [False, True])
def test_outcome_rising_or_falling_is_learnt_alike(rising):
    weights_ND, unseen_ND = mixtures(60, 6, seed=8), mixtures(300, 6, seed=9)
    sign = 1.0 if rising else -1.0
    fit = MixtureSurrogate().fit(weights_ND, sign * saturating(weights_ND))
    assert (r2(fit.predict(unseen_ND), sign * saturating(unseen_ND)) > 0.97).all()


@settings(deadline=None, max_examples=5)
@given(scale=st.sampled_from([1e-9, 1e-3, 1e9]), shift=st.sampled_from([0.0, 7.0]))
def test_units_do_not_matter(scale, shift):
    weights_ND, unseen_ND = mixtures(40, 5, seed=1), mixtures(50, 5, seed=2)
    outcomes_NV = saturating(weights_ND, 1)
    plain_NV = MixtureSurrogate().fit(weights_ND, outcomes_NV).predict(unseen_ND)
    other_NV = MixtureSurrogate().fit(weights_ND, scale * (outcomes_NV + shift)).predict(unseen_ND)
    np.testing.assert_allclose(other_NV / scale - shift, plain_NV, atol=1e-3 * outcomes_NV.std())


def test_zero_weights_one_domain_and_a_constant_outcome_are_fine():
    weights_ND = mixtures(40, 6, seed=1)
    weights_ND[:, 5] = 0
    weights_ND[::3, 1] = 0
    weights_ND /= weights_ND.sum(axis=1, keepdims=True)
    outcomes_NV = np.column_stack([saturating(weights_ND, 1), np.full(40, 3.7)])
    surrogate = MixtureSurrogate().fit(weights_ND, outcomes_NV)
    predicted_NV = surrogate.predict(np.eye(6))
    assert np.isfinite(predicted_NV).all()
    np.testing.assert_allclose(predicted_NV[:, 1], 3.7)
    skill = surrogate.cross_validate(weights_ND, outcomes_NV)
    assert skill.spearman_V[0] > 0.9
    assert skill.spearman_V[1] == skill.r2_V[1] == 0
    only = MixtureSurrogate().fit(np.ones((12, 1)), np.arange(12.0)[:, None])
    np.testing.assert_allclose(only.predict([[1.0]]), [[5.5]])


def test_same_seed_same_bits():
    weights_ND, outcomes_NV = mixtures(120, 6), saturating(mixtures(120, 6), 1)
    outcomes_NV += 0.1 * np.random.default_rng(0).normal(size=outcomes_NV.shape)

    def predicted(seed):
        return MixtureSurrogate(seed=seed).fit(weights_ND, outcomes_NV).predict(weights_ND)

    np.testing.assert_array_equal(predicted(1), predicted(1))
    assert (predicted(1) != predicted(2)).any()


def test_a_held_out_prediction_does_not_know_its_own_outcome():
    weights_ND, outcomes_NV = mixtures(30, 4), saturating(mixtures(30, 4))
    changed_NV = outcomes_NV.copy()
    changed_NV[7] += 100
    surrogate = MixtureSurrogate(max_trees=50)
    before = surrogate.cross_validate(weights_ND, outcomes_NV)
    after = surrogate.cross_validate(weights_ND, changed_NV)
    np.testing.assert_array_equal(before.predictions_NV[7], after.predictions_NV[7])
    assert (before.predictions_NV != after.predictions_NV).mean() > 0.5
    for v in range(2):
        predicted_N, outcome_N = before.predictions_NV[:, v], outcomes_NV[:, v]
        assert before.spearman_V[v] == pytest.approx(spearmanr(predicted_N, outcome_N).statistic)
        assert before.r2_V[v] == pytest.approx(r2(predicted_N, outcome_N))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000))
def test_gradient_of_the_mixing_law(seed):
    rng = np.random.default_rng(seed)
    weights_ND = rng.dirichlet(np.full(4, 0.5), 15)
    weights_ND[0] = [0, 0, 1, 0]
    logs_ND, outcome_N = _logarithms(4 * weights_ND), rng.normal(size=15)
    law, theta = MixingLaw(), rng.normal(size=8)
    error = check_grad(
        lambda t: law._squares(t, logs_ND, outcome_N)[0],
        lambda t: law._squares(t, logs_ND, outcome_N)[1],
        theta,
    )
    assert error < 1e-4 * (1 + np.abs(law._squares(theta, logs_ND, outcome_N)[1]).max())


def test_ridge_has_the_penalty_that_leaving_out_each_candidate_prefers():
    rng = np.random.default_rng(0)
    weights_ND = rng.dirichlet(np.ones(5), 20)
    outcome_N = np.log(weights_ND + 0.01) @ rng.normal(size=5) + rng.normal(size=20)
    ridge = LogRidge().fit(weights_ND, outcome_N)
    features_ND = np.log(5 * weights_ND + 0.01)
    features_ND = (features_ND - features_ND.mean(axis=0)) / features_ND.std(axis=0)
    design = np.column_stack([np.ones(20), features_ND])

    def coefficients(rows, penalty):
        gram = design[rows].T @ design[rows] + 20 * penalty * np.diag([0.0, 1, 1, 1, 1, 1])
        return np.linalg.solve(gram, design[rows].T @ outcome_N[rows])

    def left_out_error(penalty):
        return sum(
            (design[n] @ coefficients(np.delete(np.arange(20), n), penalty) - outcome_N[n]) ** 2
            for n in range(20)
        )

    best = min(10.0 ** np.arange(-3, 2.1, 0.5), key=left_out_error)
    np.testing.assert_allclose(
        ridge.predict(weights_ND), design @ coefficients(np.arange(20), best), rtol=1e-8
    )


@pytest.mark.parametrize(
    ("weights_ND", "outcomes_NV", "message"),
    [
        (np.full((12, 3), 0.5), np.zeros((12, 1)), "row 0 is no mixture"),
        (-np.eye(12), np.zeros((12, 1)), "row 0 is no mixture"),
        (np.full((12, 2), np.nan), np.zeros((12, 1)), "row 0 is no mixture"),
        (np.ones(12), np.zeros((12, 1)), "a mixture per row"),
        (np.eye(12), np.zeros(12), "a row per candidate"),
        (np.eye(12), np.zeros((11, 1)), "a row per candidate"),
        (np.eye(9), np.zeros((9, 1)), "too few for a surrogate"),
        (np.eye(12), np.full((12, 1), np.inf), "candidate 0 on task 0 is inf"),
    ],
)
def test_bad_input_is_told_in_a_sentence(weights_ND, outcomes_NV, message):
    for method in (MixtureSurrogate().fit, MixtureSurrogate().cross_validate):
        with pytest.raises(InputError, match=message):
            method(weights_ND, outcomes_NV)


def test_bad_arguments_are_told_in_a_sentence():
    with pytest.raises(InputError, match="seed is -1"):
        MixtureSurrogate(seed=-1)
    with pytest.raises(InputError, match="num_leaves"):
        MixtureSurrogate(num_leaves=1)
    with pytest.raises(InputError, match="call fit before"):
        MixtureSurrogate().predict(np.eye(3))
    with pytest.raises(InputError, match="3 domains; the surrogate was fitted on 12"):
        MixtureSurrogate().fit(np.eye(12), np.zeros((12, 1))).predict(np.eye(3))
    with pytest.raises(InputError, match="folds is 5 for 12 candidates"):
        MixtureSurrogate().cross_validate(np.eye(12), np.zeros((12, 1)))
