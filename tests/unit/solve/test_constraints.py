"""Constraints of TiKMiX-D: that they hold, which give way, and which conflict."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup, MixtureConstraints, epoch_caps
from megatron_tikmix.solve.objective import Goal
from megatron_tikmix.solve.tikmix_d import Problem
from tests.solving import limited, solve_d

ABC = ["a", "b", "c"]


def solve(influence_VD, prior, reference=None, options=None, **constraints):
    influence_VD = np.atleast_2d(np.asarray(influence_VD, float))
    domains = [chr(97 + d) for d in range(influence_VD.shape[1])]
    influence = InfluenceMatrix(
        influence_VD, domains=domains, tasks=[f"t{v}" for v in range(len(influence_VD))]
    )
    if not isinstance(prior, Mixture):
        prior = Mixture(dict(zip(domains, prior, strict=True)))
    return solve_d(
        influence,
        prior,
        constraints=limited(**constraints),
        diversity_reference=reference,
        **(options or {}),
    )


def test_groups_hold_and_are_named():
    groups = {
        "code": DomainGroup(domains=["a", "b"], upper=0.4),
        "text": DomainGroup(domains=["d", "e"], lower=0.3),
    }
    solution = solve([[3.0, 2.0, 1.0, 0.0, 0.0]], [0.2] * 5, groups=groups, pareto=False)
    assert solution.mixture["a"] + solution.mixture["b"] == pytest.approx(0.4, abs=1e-8)
    assert solution.mixture["d"] + solution.mixture["e"] == pytest.approx(0.3, abs=1e-8)
    assert {"group_upper:code", "group_lower:text"} <= set(solution.active_constraints)


def test_fixed_domains_do_not_move_the_others_do():
    for fixed in (["b"], {"b": 0.2}):
        solution = solve([[3.0, 0.0, 1.0]], [0.3, 0.2, 0.5], fixed=fixed)
        assert solution.mixture["b"] == pytest.approx(0.2, abs=1e-12)
        assert solution.total_variation > 0.1
        assert "fixed:b" in solution.active_constraints
    assert solve([[3.0, 0.0]], [0.3, 0.7], fixed={"a": 0.3, "b": 0.7}).mixture["a"] == 0.3


def test_pareto_slack_lets_a_task_lose_just_so_much():
    influence = [[3.0, 1, 1], [3.0, 1, 1], [-1.0, 0, 0]]
    solution = solve(influence, [0.2, 0.4, 0.4], pareto_slack=0.05, options={"alpha": 0})
    lost = solution.gain_before["t2"] - solution.gain_after["t2"]
    assert lost == pytest.approx(0.05, abs=1e-8)


def test_the_reference_of_the_diversity_term_has_a_closed_form():
    """Without constraints and with one task, w ∝ reference · exp(4·row/γ)."""
    reference = Mixture({"a": 0.6, "b": 0.3, "c": 0.1})
    free = {"max_total_variation": None, "pareto": False}
    row_D = np.array([0.2, 1.0, -0.5])
    solution = solve([row_D], [0.3, 0.3, 0.4], reference, options={"gamma": 2.0}, **free)
    expected_D = reference.array(ABC) * np.exp(4 * row_D / 2.0)
    np.testing.assert_allclose(
        solution.mixture.array(ABC), expected_D / expected_D.sum(), atol=1e-7
    )
    uniform = solve([row_D], [0.3, 0.3, 0.4], Mixture.uniform(ABC), **free)
    entropy = solve([row_D], [0.3, 0.3, 0.4], **free)
    np.testing.assert_allclose(uniform.mixture.array(), entropy.mixture.array(), atol=1e-7)
    # KL to the prior: nothing to gain, nothing moves.
    kept = solve(np.zeros((1, 3)), [0.3, 0.3, 0.4], Mixture({"a": 3, "b": 3, "c": 4}), **free)
    np.testing.assert_allclose(kept.mixture.array(), [0.3, 0.3, 0.4], atol=1e-7)


def test_a_domain_without_reference_weight_gets_none():
    reference = Mixture({"a": 0.5, "b": 0.5, "c": 0})
    solution = solve([[0.0, 0.1, 5.0]], [0.4, 0.4, 0.2], reference, pareto=False)
    assert solution.mixture["c"] == 0
    assert "reference:c" in solution.active_constraints


def test_epoch_caps_follow_the_tokens_left():
    caps = epoch_caps({"a": 100, "b": 1000, "c": 50}, {"a": 150, "b": 0, "c": 300}, 400, 4)
    assert caps == {"a": 250 / 400, "b": 4000 / 400, "c": 0.0}
    solution = solve([[1.0, 0.0, 1.0]], [0.5, 0.3, 0.2], epoch_caps=caps, pareto=False)
    assert solution.mixture["c"] == 0
    assert solution.mixture["a"] == pytest.approx(0.625, abs=1e-8)
    assert {"max_epochs:a", "max_epochs:c"} <= set(solution.active_constraints)
    with pytest.raises(InputError, match="interval_tokens"):
        epoch_caps({"a": 1}, {"a": 0}, 0, 4)
    with pytest.raises(InputError, match="domain x"):
        epoch_caps({"a": 1}, {"a": 0}, 1, {"x": 4})


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"lower": {"a": 0.5, "b": 0.6}}, "lower:a, lower:b cannot hold together: .* 0.1;"),
        (
            {"lower": {"a": 0.5}, "groups": {"g": DomainGroup(domains=["a", "b"], upper=0.3)}},
            "lower:a, group_upper:g cannot .* by 0.2;",
        ),
        ({"fixed": {"a": 0.7}, "upper": {"a": 0.5}}, "fixed:a, upper:a cannot .* by 0.2;"),
        ({"epoch_caps": dict.fromkeys(ABC, 0.1)}, "max_epochs:a, max_epochs:b, .* by 0.7;"),
        ({"fixed": "abc"}, "fixed: 'abc' must be a list"),
        ({"fixed": ["x"]}, "fixed: domain x"),
        ({"groups": {"g": DomainGroup(domains=["x"])}}, "groups: g names domain x"),
        ({"confidence": 0.95}, "confidence is set, and the influence matrix has no standard"),
    ],
)
def test_hard_constraints_that_cannot_hold_are_named_with_the_amount(constraints, message):
    with pytest.raises(InputError, match=message):
        solve([[1.0, 0.5, 0.2]], [0.4, 0.3, 0.3], **constraints)


def test_of_a_thousand_constraints_only_those_in_conflict_are_named():
    rng = np.random.default_rng(0)
    names = [f"domain{d:04}" for d in range(1000)]
    lower = dict(zip(names, (rng.dirichlet(np.ones(1000)) * 0.2).tolist(), strict=True))
    lower[names[17]] = 0.4
    lower[names[18]] = 0.3
    influence = InfluenceMatrix(rng.normal(size=(2, 1000)), domains=names, tasks=["t", "u"])
    group = DomainGroup(domains=[names[17], names[18]], upper=0.6)
    constraints = limited(lower=lower, groups={"pair": group})
    expected = f"constraints lower:{names[17]}, lower:{names[18]}, group_upper:pair cannot"
    with pytest.raises(InputError, match=expected):
        solve_d(influence, Mixture.uniform(names), constraints=constraints)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: limited(pareto_slack=-0.1), "pareto_slack"),
        (lambda: limited(confidence=0.2), "confidence"),
        (lambda: limited(confidence=1.0), "confidence"),
        (lambda: DomainGroup(domains=[]), "name domains"),
        (lambda: DomainGroup(domains=["a", "a"]), "each once"),
        (lambda: DomainGroup(domains=["a"], lower=0.5, upper=0.4), "lower ≤ upper"),
        (lambda: DomainGroup(domains=["a"], upper=math.nan), "lower ≤ upper"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


# What gives way where the prior breaks a hard constraint -------------------------------------


def test_pareto_stays_where_it_can():
    """The prior breaks a cap, and what is better for every task exists within it."""
    solution = solve([[0.0, 1.0]], [0.8, 0.2], upper={"a": 0.7})
    assert (solution.status, solution.reason) == ("solved", "")
    assert solution.gain_after["t0"] >= solution.gain_before["t0"]
    assert solution.mixture["a"] <= 0.7


def test_pareto_gives_way_first_and_it_is_said():
    """The cap takes weight from the only domain that helps the task."""
    solution = solve([[1.0, 0.0, 0.1]], [0.8, 0.1, 0.1], upper={"a": 0.7}, options={"gamma": 0})
    assert solution.status == "solved"
    assert "upper:a, pareto:t0 cannot hold together: they miss by" in solution.reason
    assert "Pareto is measured from the nearest mixture" in solution.reason
    assert solution.mixture["a"] == pytest.approx(0.7, abs=1e-7)
    assert solution.mixture["c"] == pytest.approx(0.3, abs=1e-6)  # the best within the limits
    assert solution.total_variation <= 0.25 + 1e-9


def test_the_limit_gives_way_next_and_no_further_than_it_must():
    solution = solve([[1.0, 0.5, 0.1]], [0.8, 0.15, 0.05], upper={"a": 0.4})
    assert solution.status == "solved"
    assert "upper:a, total_variation cannot hold together: they miss by 0.15" in solution.reason
    assert "moves further than its limit" in solution.reason
    assert solution.mixture["a"] == pytest.approx(0.4, abs=1e-7)
    assert solution.total_variation == pytest.approx(0.4, abs=1e-7)


def test_the_nearest_mixture_that_is_allowed_spreads_what_is_moved_in_proportion():
    """The least KL divergence from a prior whose first weight is too large scales the others."""
    prior = Mixture({"a": 0.8, "b": 0.15, "c": 0.05})
    problem = Problem.of(
        InfluenceMatrix([[1.0, 0.5, 0.1]], domains=ABC, tasks=["t"]),
        prior,
        Goal(),
        limited(upper={"a": 0.4}),
    )
    nearest_D = problem.nearest_to_prior(problem.region.hard())
    np.testing.assert_allclose(nearest_D, [0.4, 0.45, 0.15], atol=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_hard_constraints_hold_whatever_the_prior(seed):
    rng = np.random.default_rng(seed)
    D = int(rng.integers(2, 9))
    inside_D, prior_D = rng.dirichlet(np.ones(D)), rng.dirichlet(np.full(D, 0.3))
    names = [chr(97 + d) for d in range(D)]
    upper = dict(zip(names, np.minimum(1, 1.3 * inside_D).tolist(), strict=True))
    lower = dict(zip(names, (0.7 * inside_D).tolist(), strict=True))
    half = names[: D // 2]
    of_half = float(inside_D[: D // 2].sum())
    solution = solve(
        rng.normal(size=(3, D)),
        prior_D,
        upper=upper,
        lower=lower,
        groups={"half": DomainGroup(domains=half, upper=min(1.0, of_half * 1.05))},
    )
    for name, weight in solution.mixture.items():
        assert lower[name] - 1e-8 <= weight <= upper[name] + 1e-8
    assert sum(solution.mixture[name] for name in half) <= of_half * 1.05 + 1e-8
    if solution.total_variation > 0.25 + 1e-8:
        assert "further than its limit" in solution.reason


def test_a_bound_on_one_weight_has_a_closed_form():
    """Of w ∝ exp(4r) with one weight capped, the others keep their proportions."""
    row_D = np.array([1.0, 0.3, 0.0])
    free = {"max_total_variation": None, "pareto": False}
    weights_D = solve([row_D], [1 / 3] * 3, upper={"a": 0.5}, **free).mixture.array()
    rest_D = np.exp(4 * row_D[1:])
    np.testing.assert_allclose(weights_D[1:], 0.5 * rest_D / rest_D.sum(), atol=1e-7)
    # A floor under another is the same from below.
    weights_D = solve([row_D], [1 / 3] * 3, lower={"c": 0.2}, **free).mixture.array()
    rest_D = np.exp(4 * row_D[:2])
    np.testing.assert_allclose(weights_D[:2], 0.8 * rest_D / rest_D.sum(), atol=1e-7)


def test_the_limit_to_the_change_has_a_closed_form():
    """Between two domains that differ, the limit is reached; between three, what is taken and what
    is given follow w_j ∝ exp(4 r_j) on either side, by one price for the change."""
    row_D, prior_D, limit = np.array([1.0, 0.9, -1.0]), np.array([0.2, 0.2, 0.6]), 0.1
    solution = solve(
        [row_D], prior_D, max_total_variation=limit, pareto=False, options={"gamma": 1.0}
    )

    def gained(nu):
        return np.maximum(np.exp(4 * row_D[:2] - nu), prior_D[:2]) - prior_D[:2]

    nu = brentq(lambda nu: gained(nu).sum() - limit, 0, 20, xtol=1e-14)
    np.testing.assert_allclose(
        solution.mixture.array(), [*(prior_D[:2] + gained(nu)), 0.5], atol=1e-7
    )


def test_a_confidence_without_pareto_is_refused():
    with pytest.raises(InputError, match="confidence is about Pareto"):
        MixtureConstraints(confidence=0.9)
