"""Joint influence against gradients made by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from megatron_tikmix.influence.matrix import OWN_ROW, InfluenceMatrix, joint_influence


def measured(tasks_VP, domains_DP, error=None):
    """What a probe without noise measures: inner products of gradients."""
    names = [f"d{j}" for j in range(len(domains_DP))]
    rows = np.vstack([tasks_VP, domains_DP]) @ domains_DP.T
    return InfluenceMatrix(
        rows,
        domains=names,
        tasks=[f"t{i}" for i in range(len(tasks_VP))] + [OWN_ROW + name for name in names],
        standard_error_VD=None if error is None else np.full(rows.shape, error),
        degrees_of_freedom=None if error is None else 7,
    )


def test_what_only_has_the_right_words_gets_little():
    """A task's gradient is words and meaning. The real text has both, the shuffled one words alone:
    marginal influence hardly tells them apart, joint influence does."""
    words, meaning, other = np.eye(3)
    tasks_VP = np.array([3 * words + meaning])
    domains_DP = np.array([3 * words + meaning, 3 * words, other])
    marginal = measured(tasks_VP, domains_DP)
    joint = joint_influence(marginal)
    assert marginal.values_VD[0, 1] == pytest.approx(0.9 * marginal.values_VD[0, 0])
    assert joint.values_VD[0, 1] < 0.15 * joint.values_VD[0, 0]
    assert joint.values_VD[0, 2] == 0
    assert joint.tasks == ("t0",)


def test_duplicates_share_what_they_are_worth():
    task, other = np.eye(2)
    alone = joint_influence(measured(task[None], np.array([task, other])))
    twice = joint_influence(measured(task[None], np.array([task, other, task])))
    assert twice.values_VD[0, 0] + twice.values_VD[0, 2] == pytest.approx(
        alone.values_VD[0, 0], rel=0.02
    )


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_it_is_the_best_step_to_second_order(seed):
    """Against a general solver on the quadratic of the docstring, with the ridge it states."""
    rng = np.random.default_rng(seed)
    D, P = int(rng.integers(2, 7)), 12
    domains_DP, task_P = rng.normal(size=(D, P)), rng.normal(size=P)
    joint_D = joint_influence(measured(task_P[None], domains_DP)).values_VD[0]
    gram_DD = domains_DP @ domains_DP.T
    gram_DD += 0.01 * np.diag(gram_DD).mean() * np.eye(D)
    slope_D = domains_DP @ task_P

    def value(a_D):
        return 0.5 * a_D @ gram_DD @ a_D - slope_D @ a_D, gram_DD @ a_D - slope_D

    best = minimize(value, np.ones(D), jac=True, bounds=[(0, None)] * D, method="L-BFGS-B")
    assert value(joint_D)[0] <= best.fun + 1e-8


def test_errors_are_those_of_fits_to_noisy_products():
    rng = np.random.default_rng(0)
    domains_DP = rng.normal(size=(3, 30))
    task_P = domains_DP[0] + 0.7 * domains_DP[1] + 0.4 * domains_DP[2]
    exact = measured(task_P[None], domains_DP, error=0.3)
    found = joint_influence(exact)
    drawn = []
    for _ in range(4000):
        noisy = np.array(exact.values_VD)
        noisy[0] += 0.3 * rng.normal(size=3)
        redrawn = InfluenceMatrix(noisy, domains=exact.domains, tasks=exact.tasks)
        drawn.append(joint_influence(redrawn).values_VD[0])
    np.testing.assert_allclose(found.standard_error_VD[0], np.std(drawn, axis=0), rtol=0.06)
    assert found.degrees_of_freedom == 7


def test_without_rows_of_the_domains_nothing_changes():
    plain = InfluenceMatrix([[1.0, -0.5]], domains=["a", "b"], tasks=["t"])
    assert joint_influence(plain) is plain


def test_a_domain_without_its_own_row_is_left_out():
    whole = measured(np.eye(3)[:1], np.eye(3))
    less = InfluenceMatrix(whole.values_VD[:-1], domains=whole.domains, tasks=whole.tasks[:-1])
    assert joint_influence(less).domains == ("d0", "d1")
