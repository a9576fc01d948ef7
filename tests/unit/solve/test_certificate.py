"""The duality gap: a bound that holds whatever the multipliers, and is tight at the optimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve import conic, slsqp
from megatron_tikmix.solve.certificate import OPTIMAL, Multipliers, certify, lower_bound
from megatron_tikmix.solve.constraints import DomainGroup
from megatron_tikmix.solve.objective import Goal
from megatron_tikmix.solve.region import FEASIBLE
from megatron_tikmix.solve.tikmix_d import Problem
from tests.solving import limited, solve_d


def random_problem(seed, confidence=None, gain="linear"):
    rng = np.random.default_rng(seed)
    D, V = int(rng.integers(2, 12)), int(rng.integers(1, 6))
    names = [chr(97 + d) for d in range(D)]
    prior_D = rng.dirichlet(np.ones(D))
    influence_VD = rng.normal(size=(V, D))
    influence = InfluenceMatrix(
        influence_VD,
        domains=names,
        tasks=[f"t{v}" for v in range(V)],
        standard_error_VD=0.1 * rng.uniform(0.5, 1.5, (V, D)),
    )
    of_half = float(prior_D[: D // 2].sum())
    group = DomainGroup(domains=names[: D // 2], upper=min(1.0, of_half + 0.05))
    problem = Problem.of(
        influence,
        Mixture(dict(zip(names, prior_D.tolist(), strict=True))),
        Goal(alpha=float(rng.choice([0, 1, 2])), gamma=float(rng.choice([0, 0.3, 1])), gain=gain),
        limited(
            max_total_variation=rng.choice([None, 0.2]),
            groups={"half": group},
            upper={names[0]: float(min(1.0, prior_D[0] + 0.1))},
            confidence=confidence,
        ),
    )
    return rng, problem


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0.9]), st.sampled_from(["linear", "log"]))
@settings(deadline=None, max_examples=40)
def test_no_feasible_point_is_below_the_bound_whatever_the_multipliers(seed, confidence, gain):
    rng, problem = random_problem(seed, confidence, gain)
    objective, region = problem.objective, problem.region
    V, D = objective.rows_VD.shape
    size = float(rng.choice([0.1, 1.0, 10.0]))
    multipliers = Multipliers(
        std_V=size * rng.normal(size=V),
        groups_M=size * rng.normal(size=len(region.groups_MD)),
        change=size * float(rng.normal()),
        pareto_V=size * rng.normal(size=V),
        cones_VD=None if confidence is None else size * rng.normal(size=(V, D)),
    )
    bound = lower_bound(objective, region, multipliers, rng.dirichlet(np.ones(D)))
    towards_ND = rng.dirichlet(np.full(D, 0.5), 2000) - region.prior_D
    points_ND = region.prior_D + rng.uniform(0, 0.3, (2000, 1)) * towards_ND
    feasible = [w_D for w_D in points_ND if region.violation(w_D)[0] == 0]
    values = [objective.value(w_D) for w_D in [region.prior_D, *feasible]]
    assert bound <= min(values) + 1e-10


@given(st.integers(0, 2**32 - 1), st.sampled_from([None, 0.9]), st.sampled_from(["linear", "log"]))
@settings(deadline=None, max_examples=40)
def test_the_bound_is_tight_at_the_optimum_of_both_solvers(seed, confidence, gain):
    _, problem = random_problem(seed, confidence, gain)
    found = []
    for solve in (conic.solve, slsqp.solve):
        answer = solve(problem.objective, problem.region)
        weights_D = problem.region.tidied(answer.weights_D)
        certificate = certify(problem.objective, problem.region, weights_D, answer.multipliers)
        if solve is conic.solve:
            # With the logarithm, and more without any diversity, it can take another try.
            exact = {"linear": 1, "log": 10 if problem.objective.gamma else 300}[gain]
            assert certificate.gap <= exact * OPTIMAL
            assert certificate.violation <= FEASIBLE
        if certificate.holds:
            found.append(problem.objective.value(weights_D))
    assert not found or max(found) - min(found) <= 1e-6


def test_a_worse_mixture_has_a_gap_of_all_that_it_is_worse():
    _, problem = random_problem(3)
    answer = conic.solve(problem.objective, problem.region)
    best, prior_D = problem.objective.value(answer.weights_D), problem.region.prior_D
    certificate = certify(problem.objective, problem.region, prior_D, answer.multipliers)
    assert certificate.gap == pytest.approx(problem.objective.value(prior_D) - best, abs=1e-6)
    assert certificate.gap > 0.01
    assert not certificate.holds


def test_a_broken_constraint_is_no_certificate():
    _, problem = random_problem(3)
    answer = conic.solve(problem.objective, problem.region)
    beyond_D = answer.weights_D + 1e-6 * (answer.weights_D - problem.region.prior_D)
    beyond_D[0] = problem.region.upper_D[0] + 1e-7
    certificate = certify(problem.objective, problem.region, beyond_D, answer.multipliers)
    assert certificate.violation == pytest.approx(1e-7, rel=0.01) or certificate.violation > 1e-7
    assert not certificate.holds


def test_every_solution_of_a_thousand_domains_is_certified():
    rng = np.random.default_rng(0)
    names = [f"domain{d:04}" for d in range(1000)]
    prior = Mixture(dict(zip(names, rng.dirichlet(np.ones(1000)).tolist(), strict=True)))
    influence = InfluenceMatrix(
        rng.normal(size=(20, 1000)), domains=names, tasks=[f"t{v}" for v in range(20)]
    )
    solution = solve_d(influence, prior)
    assert (solution.status, solution.solver) == ("solved", "clarabel")
    assert solution.certificate is not None
    assert solution.certificate.gap <= 1e-6
    assert solution.certificate.violation <= 1e-8
