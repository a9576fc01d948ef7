from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.objective import LOG_FLOOR, Objective
from tests.solving import limited, solve_d

seeds = given(st.integers(0, 2**32 - 1))
some = settings(deadline=None, max_examples=60)


def case(seed, tasks=None):
    rng = np.random.default_rng(seed)
    tasks, domains = tasks or int(rng.integers(1, 8)), int(rng.integers(2, 12))
    return rng, rng.normal(size=(tasks, domains)), rng.dirichlet(np.ones(domains))


def slope_by_differences(function, at, step=1e-6):
    steps = step * np.eye(len(at))
    return np.array([(function(at + s) - function(at - s)) / (2 * step) for s in steps])


@seeds
@some
def test_the_three_parts_are_what_the_formula_says(seed):
    _, influence_VD, weights_D = case(seed)
    objective = Objective.of(influence_VD, alpha=0.7, beta=1.3, gamma=0.4)
    gains_V = [(row / max(abs(row))) @ weights_D for row in influence_VD]
    std, gain, spread = np.std(gains_V), 4 * np.mean(gains_V), entropy(weights_D)
    assert objective.uniformity(objective.rows_VD @ weights_D)[0] == pytest.approx(std, abs=1e-12)
    assert objective.gain(objective.rows_VD @ weights_D)[0] == pytest.approx(gain)
    assert objective.diversity(weights_D)[0] == pytest.approx(spread)
    assert objective.value(weights_D) == pytest.approx(0.7 * std - 1.3 * gain - 0.4 * spread)


@seeds
@some
def test_the_logarithmic_gain_is_concave_and_touches_the_linear_one_at_1(seed):
    """Against its definition as an infimum: the least of the tangents of 1 + ln x from 0.05 up."""
    rng = np.random.default_rng(seed)
    gains_V = rng.uniform(-1, 1, 3)
    objective = Objective.of(np.eye(3), gain="log")
    at = np.geomspace(LOG_FLOOR, 1, 200_001)[:, None]
    lowest_V = (1 + np.log(at) + (gains_V - at) / at).min(axis=0)
    assert objective.gain(gains_V)[0] == pytest.approx(4 * lowest_V.mean(), abs=1e-6)
    ones = objective.gain(np.ones(3))
    assert ones[0] == pytest.approx(4)
    np.testing.assert_allclose(ones[1], 4 / 3)


def test_tasks_of_their_own_domains_share_equally_under_the_logarithm():
    """max Σ ln w_i on the simplex: no diversity term is needed, and the linear gain has none."""
    influence = InfluenceMatrix(np.eye(3), domains=["a", "b", "c"], tasks=["t", "u", "v"])
    prior = Mixture({"a": 0.8, "b": 0.1, "c": 0.1})
    solution = solve_d(
        influence,
        prior,
        alpha=0.0,
        gamma=0.0,
        gain="log",
        constraints=limited(pareto=False, max_total_variation=None),
    )
    assert solution.status == "solved"
    assert solution.mixture.array() == pytest.approx([1 / 3] * 3, abs=1e-5)


@seeds
@some
def test_gradients_equal_finite_differences(seed):
    rng, influence_VD, weights_D = case(seed)
    weights_D = 0.9 * weights_D + 0.1 / len(weights_D)
    weights_V = rng.random(len(influence_VD))
    objective = Objective.of(influence_VD, alpha=2.0, gamma=0.5, task_weights_V=weights_V)
    gains_V = objective.rows_VD @ weights_D
    std = objective.uniformity(gains_V)[0]
    assume(len(gains_V) == 1 or std > 1e-2)  # differences across the kink say nothing

    def check(part, at):
        expected = slope_by_differences(lambda x: part(x)[0], at)
        np.testing.assert_allclose(part(at)[1], expected, atol=1e-6)

    check(objective.gain, gains_V)
    logarithmic = replace(objective, gain_kind="log")
    assume((abs(gains_V - LOG_FLOOR) > 1e-4).all())  # there the second derivative jumps
    check(logarithmic.gain, gains_V)
    check(objective.diversity, weights_D)
    for smoothing in (0.0, std / 2, 2 * std):  # std itself, and its parabola
        check(lambda x, s=smoothing: objective.uniformity(x, s), gains_V)
        check(lambda x, s=smoothing: objective.value_and_gradient(x, s), weights_D)


@seeds
@some
def test_at_the_kink_the_gradient_is_a_subgradient(seed):
    rng, influence_VD, _ = case(seed)
    objective = Objective.of(influence_VD)
    level_V = np.full(len(influence_VD), rng.normal())
    for smoothing in (0.0, 1e-3):
        at_V = level_V + smoothing * 0.1 * rng.normal(size=len(level_V))
        value, slope_V = objective.uniformity(at_V, smoothing)
        for other_V in level_V + rng.normal(size=(50, len(level_V))):
            there = objective.uniformity(other_V, smoothing)[0]
            assert there >= value + slope_V @ (other_V - at_V) - 1e-12


@seeds
@some
def test_smoothing_raises_std_by_at_most_half_of_it(seed):
    rng, influence_VD, _ = case(seed, tasks=4)
    objective = Objective.of(influence_VD)
    for size in (0.0, 1e-3, 0.05, 1.0):
        gains_V = 0.3 + size * rng.normal(size=4)
        std, smooth = (objective.uniformity(gains_V, smoothing)[0] for smoothing in (0.0, 0.1))
        assert -1e-15 <= smooth - std <= 0.05 + 1e-15
        assert std < 0.1 or smooth == std


@seeds
@some
def test_the_scale_of_a_row_and_rows_of_zeros_do_not_matter(seed):
    rng, influence_VD, weights_D = case(seed)
    value = Objective.of(influence_VD).value(weights_D)
    scaled_VD = influence_VD * 10 ** rng.uniform(-200, 200, (len(influence_VD), 1))
    assert Objective.of(scaled_VD).value(weights_D) == pytest.approx(value, abs=1e-9)
    with_zeros_VD = np.vstack([0 * influence_VD[:1], influence_VD])
    for preset in (None, "paper"):
        value = Objective.of(influence_VD, preset=preset).value(weights_D)
        assert Objective.of(with_zeros_VD, preset=preset).value(weights_D) == pytest.approx(
            value, abs=1e-9
        )


def test_rows_that_are_all_negative_keep_their_sign():
    objective = Objective.of(np.array([[-1.0, -2.0, -4.0]]))
    np.testing.assert_array_equal(objective.rows_VD, [[-0.25, -0.5, -1.0]])


@seeds
@some
def test_only_the_paper_preset_lets_more_tasks_outweigh_the_entropy(seed):
    _, influence_VD, weights_D = case(seed)
    twice_VD = np.vstack([influence_VD, influence_VD])

    def gain(influence_VD, preset):
        objective = Objective.of(influence_VD, preset=preset)
        return objective.gain(objective.rows_VD @ weights_D)[0]

    assert gain(twice_VD, None) == pytest.approx(gain(influence_VD, None))
    assert gain(twice_VD, "paper") == pytest.approx(2 * gain(influence_VD, "paper"))
    rows_VD = influence_VD / np.abs(influence_VD).max(axis=1, keepdims=True)
    assert gain(influence_VD, "paper") == pytest.approx((rows_VD @ weights_D).sum())


def test_a_task_that_weighs_double_counts_like_two():
    rng = np.random.default_rng(5)
    influence_VD, weights_D = rng.normal(size=(3, 6)), rng.dirichlet(np.ones(6))
    doubled = Objective.of(influence_VD, task_weights_V=np.array([2.0, 1.0, 1.0]))
    twice = Objective.of(influence_VD[[0, 0, 1, 2]])
    assert doubled.value(weights_D) == pytest.approx(twice.value(weights_D))


def test_a_mixture_of_one_domain_has_a_finite_slope():
    value, slope_D = Objective.of(np.eye(3)).value_and_gradient(np.array([1.0, 0.0, 0.0]))
    assert np.isfinite(slope_D).all()
    assert value == pytest.approx(np.std([1, 0, 0]) - 4 / 3)
