import numpy as np
import pytest

from megatron_tikmix.influence.matrix import InfluenceMatrix, smoothed

TASKS, DOMAINS = ["t", "u"], ["a", "b", "c"]


def matrix(values_VD, error=0.1, domains=DOMAINS, tasks=TASKS):
    values_VD = np.asarray(values_VD, float)
    errors_VD = np.full(values_VD.shape, error)
    return InfluenceMatrix(values_VD, domains=domains, tasks=tasks, standard_error_VD=errors_VD)


def test_without_smoothing_the_latest_stands_alone():
    history = [matrix(np.ones((2, 3))), matrix([[1.0, -2, 3], [4, 5, 6]])]
    found = smoothed(history, 0.0)
    np.testing.assert_array_equal(found.values_VD, history[-1].values_VD)
    np.testing.assert_allclose(found.standard_error_VD, 0.1, rtol=1e-15)


def test_the_average_is_exponential_over_rows_of_the_same_scale():
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (3, 2, 3))
    rows[:, :, 0] = 1.0  # the largest: rows are normalised already
    found = smoothed([matrix(r) for r in rows], 0.5)
    expected = (rows[2] + 0.5 * rows[1] + 0.25 * rows[0]) / 1.75
    np.testing.assert_allclose(found.values_VD, expected, rtol=1e-12)
    error = 0.1 * np.sqrt(1 + 0.25 + 0.0625) / 1.75
    np.testing.assert_allclose(found.standard_error_VD, error, rtol=1e-12)


def test_gradients_that_shrink_do_not_make_the_past_heavier():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 2, 3))
    plain = smoothed([matrix(first), matrix(second)], 0.5)
    shrunk = smoothed([matrix(1e6 * first, 1e5), matrix(second)], 0.5)
    np.testing.assert_allclose(shrunk.values_VD, plain.values_VD, rtol=1e-12)
    np.testing.assert_allclose(shrunk.standard_error_VD, plain.standard_error_VD, rtol=1e-12)


def test_noise_averages_out():
    rng = np.random.default_rng(2)
    truth = np.array([[1.0, 0.5, 0.0], [0.2, 1.0, 0.1]])

    def draws():
        return [matrix(truth + 0.1 * rng.normal(size=(2, 3))) for _ in range(12)]

    def distance(found):
        return found.values_VD / found.scale_V[:, None] - truth

    alone = np.std([distance(smoothed(draws(), 0.0)) for _ in range(200)])
    averaged = np.std([distance(smoothed(draws(), 0.7)) for _ in range(200)])
    # Variance (1 − s)/(1 + s) of a single draw's, s = 0.7.
    assert averaged / alone == pytest.approx(np.sqrt(0.3 / 1.7), rel=0.15)


def test_names_are_matched_and_boundaries_without_them_left_out():
    latest = matrix([[1.0, 0.5, 0.2], [0.3, 1.0, 0.1]])
    swapped = matrix(latest.values_VD[::-1, ::-1], domains=DOMAINS[::-1], tasks=TASKS[::-1])
    np.testing.assert_allclose(smoothed([swapped, latest], 0.5).values_VD, latest.values_VD)
    fewer = matrix([[9.0], [9.0]], domains=["a"])
    np.testing.assert_allclose(smoothed([fewer, latest], 0.5).values_VD, latest.values_VD)
