import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve import conic, slsqp
from megatron_tikmix.solve.certificate import Multipliers
from megatron_tikmix.solve.objective import Objective
from tests.solving import limited, solve_d

seeds = given(st.integers(0, 2**32 - 1))
some = settings(deadline=None, max_examples=25)

FREE = limited(max_total_variation=None, pareto=False)


def named(influence_VD, prior_D):
    influence_VD = np.asarray(influence_VD, dtype=float)
    domains = [f"domain{d:03}" for d in range(influence_VD.shape[1])]
    tasks = [f"task{v:03}" for v in range(influence_VD.shape[0])]
    prior = Mixture(dict(zip(domains, np.asarray(prior_D).tolist(), strict=True)))
    return InfluenceMatrix(influence_VD, domains=domains, tasks=tasks), prior


def random_case(seed, most_domains=12):
    """A matrix of one of the kinds that are hard, a prior, and the solver's options."""
    rng = np.random.default_rng(seed)
    tasks, domains = int(rng.choice([1, 2, 4, 9])), int(rng.integers(1, most_domains + 1))
    influence_VD = rng.normal(size=(tasks, domains))
    kind = rng.integers(6)
    if kind == 1:
        influence_VD = -abs(influence_VD)
    elif kind == 2:
        influence_VD = abs(influence_VD[:1]) + 0.1 * influence_VD  # tasks that agree
    elif kind == 3:
        influence_VD[:, -1] = 0
    elif kind == 4:
        influence_VD[-1] = 0
    elif kind == 5:
        influence_VD[:, -1] = influence_VD[:, 0]
    prior_D = rng.dirichlet(np.full(domains, rng.choice([0.3, 1, 10])))
    options = {
        "alpha": float(rng.choice([0, 1, 1, 3])),
        "gamma": float(rng.choice([1, 1, 0.5, 0.25])),
        "constraints": limited(
            max_total_variation=rng.choice([None, 0.25, 0.25, 0.05]), pareto=bool(rng.integers(4))
        ),
    }
    return rng, *named(influence_VD, prior_D), options


def objective_of(influence, options):
    return Objective.of(
        influence.values_VD, alpha=options.get("alpha", 1.0), gamma=options.get("gamma", 1.0)
    )


def feasible_points(rng, influence, prior, constraints, count):
    """Random mixtures within the constraints, many of them on an edge, (N, D)."""
    prior_D = prior.array()
    towards_ND = rng.dirichlet(np.full(len(prior_D), rng.choice([0.2, 1.0])), count) - prior_D
    step_N = np.ones(count)
    if constraints.max_total_variation is not None:
        moved_N = 0.5 * abs(towards_ND).sum(axis=1)
        step_N = np.minimum(step_N, constraints.max_total_variation / np.maximum(moved_N, 1e-300))
    points_ND = prior_D + (step_N * rng.choice([1.0, 0.5, 0.1], count))[:, None] * towards_ND
    if constraints.pareto:
        kept_N = ((points_ND - prior_D) @ influence.values_VD.T >= 0).all(axis=1)
        points_ND = points_ND[kept_N]
    return np.vstack([prior_D, points_ND])


@seeds
@some
def test_no_feasible_point_is_better(seed):
    rng, influence, prior, options = random_case(seed)
    solution = solve_d(influence, prior, **options)
    objective = objective_of(influence, options)
    points_ND = feasible_points(rng, influence, prior, options["constraints"], 10_000)
    # Half-way to the answer the neighbourhood of the optimum is tried as well.
    nearer_ND = solution.mixture.array() + 0.01 * (points_ND - solution.mixture.array())
    best = min(objective.value(weights_D) for weights_D in np.vstack([points_ND, nearer_ND]))
    assert solution.objective <= best + 1e-7
    assert solution.objective == pytest.approx(objective.value(solution.mixture.array()))


def lower_bound(influence, prior, options, target, rounds=80):
    """A value that L cannot be below, by linear programs alone (Kelley's cutting planes).

    Variables w, t ≥ |w − prior|, h_j ≥ w_j·ln w_j and s ≥ std(P̂), the last two by tangents of the
    convex functions, which lie below them; each round adds the tangents at the last answer. Stops
    when the bound is within 1e-7 of `target`.
    """
    prior_D, constraints = prior.array(), options["constraints"]
    rows_VD = (
        influence.values_VD / np.maximum(abs(influence.values_VD).max(axis=1), 1e-300)[:, None]
    )
    kept_VD = rows_VD[rows_VD.any(axis=1)] if rows_VD.any() else rows_VD[:1]
    centred_VD = kept_VD - kept_VD.mean(axis=0)
    zero, one, eye, null = (
        0 * prior_D,
        0 * prior_D + 1,
        np.eye(len(prior_D)),
        0 * np.eye(len(prior_D)),
    )
    cost = [-4 * kept_VD.mean(axis=0), zero, options["gamma"] * one, [options["alpha"]]]
    table = [
        np.hstack([eye, -eye, null, zero[:, None]]),
        np.hstack([-eye, -eye, null, zero[:, None]]),
    ]
    limits = [prior_D, -prior_D]
    if constraints.max_total_variation is not None:
        table.append(np.concatenate([zero, one, zero, [0]])[None])
        limits.append([2 * constraints.max_total_variation])
    if constraints.pareto:
        table.append(np.hstack([-rows_VD, 0 * rows_VD, 0 * rows_VD, 0 * rows_VD[:, :1]]))
        limits.append(-rows_VD @ prior_D)
    weights_D, bound = one / len(one), -np.inf
    for _ in range(rounds):
        at_D = np.maximum(weights_D, 1e-9)  # h ≥ at·ln(at) + (1 + ln at)(w − at)
        table.append(np.hstack([np.diag(1 + np.log(at_D)), null, -eye, zero[:, None]]))
        limits.append(at_D)
        std = np.linalg.norm(centred_VD @ weights_D) / math.sqrt(len(kept_VD))
        if std > 0:  # s ≥ (centred gains at the point)·(centred gains)/(V·std)
            slope_D = (centred_VD @ weights_D) @ centred_VD / (len(kept_VD) * std)
            table.append(np.concatenate([slope_D, zero, zero, [-1]])[None])
            limits.append([0.0])
        best = linprog(
            np.concatenate(cost),
            A_ub=np.vstack(table),
            b_ub=np.concatenate(limits),
            A_eq=np.concatenate([one, zero, zero, [0]])[None],
            b_eq=[1.0],
            bounds=[(0, 1)] * 2 * len(one) + [(-1, 0)] * len(one) + [(0, None)],
        )
        assert best.status == 0
        bound, weights_D = max(bound, best.fun), best.x[: len(one)]
        if bound >= target - 1e-7:
            break
    return bound


@seeds
@some
def test_linear_programs_prove_the_answer_optimal(seed):
    _, influence, prior, options = random_case(seed, most_domains=8)
    solution = solve_d(influence, prior, **options)
    bound = lower_bound(influence, prior, options, solution.objective)
    assert bound - 1e-6 <= solution.objective <= bound + 1e-6


@seeds
@some
def test_constraints_hold(seed):
    _, influence, prior, options = random_case(seed)
    solution = solve_d(influence, prior, **options)
    assert solution.status == "solved"
    weights_D, prior_D, constraints = (
        solution.mixture.array(),
        prior.array(),
        options["constraints"],
    )
    assert weights_D.min() >= 0
    assert weights_D.sum() == pytest.approx(1, abs=1e-12)
    if constraints.max_total_variation is not None:
        assert 0.5 * abs(weights_D - prior_D).sum() <= constraints.max_total_variation + 1e-12
    if constraints.pareto:
        largest_V = abs(influence.values_VD).max(axis=1)
        assert (influence.values_VD @ (weights_D - prior_D) >= -1e-8 * largest_V).all()


@pytest.mark.parametrize("seed", [3, 6, 31])
def test_the_solvers_rounding_is_not_taken_for_a_broken_limit(seed):
    """Of a hundred domains a solver leaves the change up to 1e-7 above its limit."""
    rng = np.random.default_rng(seed)
    influence, prior = named(rng.normal(size=(1, 100)), rng.dirichlet(np.ones(100)))
    constraints = limited(max_total_variation=0.02)
    solution = solve_d(influence, prior, beta=15, constraints=constraints)
    assert solution.status == "solved"
    assert solution.total_variation <= 0.02 + 1e-12
    assert solution.total_variation == pytest.approx(0.02, abs=1e-7)


def test_pareto_protects_a_task_that_would_lose():
    influence, prior = named([[3.0, 1, 1], [3.0, 1, 1], [-1.0, 0, 0]], [0.2, 0.4, 0.4])
    free = solve_d(influence, prior, alpha=0, constraints=FREE)
    kept = solve_d(influence, prior, alpha=0)
    assert free.gain_after["task002"] < free.gain_before["task002"] - 0.1
    assert kept.gain_after["task002"] == pytest.approx(kept.gain_before["task002"], abs=1e-8)
    assert "pareto:task002" in kept.active_constraints
    assert "pareto:task002" not in free.active_constraints


def test_one_task_has_a_closed_form():
    rng = np.random.default_rng(0)
    row_D = rng.normal(size=10)
    influence, prior = named([7.0 * row_D], rng.dirichlet(np.ones(10)))
    solution = solve_d(influence, prior, beta=0.8, gamma=0.3, constraints=FREE)
    expected_D = np.exp(0.8 * 4 * row_D / abs(row_D).max() / 0.3)
    np.testing.assert_allclose(solution.mixture.array(), expected_D / expected_D.sum(), atol=1e-7)


@pytest.mark.parametrize("limit", [None, 0.1])
def test_two_domains_against_a_fine_grid(limit):
    constraints = limited(max_total_variation=limit)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        influence, prior = named(rng.normal(size=(int(rng.integers(1, 4)), 2)), [0.3, 0.7])
        solution = solve_d(influence, prior, constraints=constraints)
        objective = objective_of(influence, {})
        grid = [
            (objective.value(np.array([x, 1 - x])), x)
            for x in np.append(np.linspace(0, 1, 4001), 0.3)
            if (influence.values_VD @ [x - 0.3, 0.3 - x] >= 0).all()
            and abs(x - 0.3) <= (limit or 1)
        ]
        assert solution.mixture["domain000"] == pytest.approx(min(grid)[1], abs=3e-4)
        assert solution.objective <= min(grid)[0] + 1e-9


def test_the_kink_where_all_tasks_gain_alike_is_found():
    rows_VD = np.array([[1.0, 0.2, 0.0], [0.2, 1.0, 0.4]])
    influence, prior = named(rows_VD, [0.5, 0.3, 0.2])
    assert solve_d(influence, prior, alpha=0, constraints=FREE).uniformity > 0.01
    solution = solve_d(influence, prior, alpha=5, constraints=FREE)
    assert solution.uniformity < 1e-7

    # Where P̂_0 = P̂_1 the optimum is w ∝ exp(4·mean row + λ·difference of rows), for one λ.
    def mixture(multiplier):
        weights_D = np.exp(4 * rows_VD.mean(axis=0) + multiplier * (rows_VD[0] - rows_VD[1]))
        return weights_D / weights_D.sum()

    multiplier = brentq(lambda x: np.diff(rows_VD @ mixture(x))[0], -5, 5, xtol=1e-14)
    np.testing.assert_allclose(solution.mixture.array(), mixture(multiplier), atol=1e-7)


@seeds
@some
def test_the_order_of_domains_and_tasks_does_not_matter(seed):
    rng, influence, prior, options = random_case(seed)
    domains = rng.permutation(list(influence.domains)).tolist()
    tasks = rng.permutation(list(influence.tasks)).tolist()
    nested = influence.to_json()["influence"]
    shuffled = InfluenceMatrix(
        [[nested[task][domain] for domain in domains] for task in tasks],
        domains=domains,
        tasks=tasks,
    )
    one = solve_d(influence, prior, **options)
    other = solve_d(shuffled, Mixture({name: prior[name] for name in domains}), **options)
    assert one == other
    assert list(other.mixture) == domains
    assert list(other.gain_after) == tasks


@seeds
@some
def test_names_and_the_scale_of_rows_do_not_matter(seed):
    """Renamed, the domains are solved in another order; scaled, rows are rounded differently."""
    rng, influence, prior, options = random_case(seed, most_domains=60)
    order = rng.permutation(len(influence.domains))
    scale_V1 = 10.0 ** rng.uniform(-9, 9, (len(influence.tasks), 1))
    renamed = named((influence.values_VD * scale_V1)[::-1, order], prior.array()[order])
    one = solve_d(influence, prior, **options).mixture.array()
    other = solve_d(*renamed, **options).mixture.array()
    np.testing.assert_allclose(other, one[order], atol=5e-6)


def test_domains_that_are_the_same_get_the_same():
    influence, prior = named([[1.0, 0.3, 1.0], [0.4, 0.9, 0.4]], [0.4, 0.2, 0.4])
    weights_D = solve_d(influence, prior).mixture.array()
    assert weights_D[0] == pytest.approx(weights_D[2], abs=1e-7)


def test_without_any_influence_the_entropy_decides():
    influence, prior = named(np.zeros((2, 4)), [0.7, 0.1, 0.1, 0.1])
    free = solve_d(influence, prior, constraints=FREE)
    np.testing.assert_allclose(free.mixture.array(), 0.25, atol=1e-7)
    limited = solve_d(influence, prior)
    assert limited.total_variation == pytest.approx(0.25, abs=1e-9)
    np.testing.assert_allclose(limited.mixture.array(), [0.45] + 3 * [0.55 / 3], atol=1e-7)
    assert limited.gain_after == {"task000": 0.0, "task001": 0.0}


def test_bounds_hold_and_bring_back_a_prior_that_breaks_them():
    influence, prior = named([[1.0, 0.5, 0.2]], [0.1, 0.1, 0.8])
    constraints = limited(lower={"domain002": 0.2}, upper={"domain002": 0.7, "domain000": 0.25})
    solution = solve_d(influence, prior, gamma=0.1, constraints=constraints)
    assert solution.status == "solved"
    np.testing.assert_allclose(solution.mixture.array(), [0.25, 0.2, 0.55], atol=1e-7)
    assert solution.active_constraints == ["upper:domain000", "total_variation"]


def test_a_bound_that_the_prior_breaks_is_enforced():
    influence, prior = named([[0.2, 0.5, 1.0]], [0.1, 0.1, 0.8])
    constraints = limited(upper={"domain002": 0.7}, pareto=False)
    solution = solve_d(influence, prior, gamma=0.1, constraints=constraints)
    assert solution.mixture["domain002"] == pytest.approx(0.7, abs=1e-9)
    assert "upper:domain002" in solution.active_constraints


def answering(weights_D, name="broken"):
    """A solver that always gives these weights, with multipliers of zero."""

    def solve(objective, region, **_):
        V = len(objective.rows_VD)
        nothing = Multipliers(np.zeros(V), np.zeros(0), 0.0, np.zeros(len(region.rows_VD)))
        weights = np.broadcast_to(np.asarray(weights_D, float), region.prior_D.shape)
        return slsqp.Answer(weights.copy(), nothing, name, "gave up", 1)

    return solve


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(np.nan, "not finite"), ([0.4, 0.2, 0.4], "pareto"), ([0.5, 0.4, 0.1], "duality gap")],
)
def test_a_solver_that_fails_is_not_believed(monkeypatch, answer, reason):
    influence, prior = named([[1.0, 0.5, 0.1], [0.5, 1.0, 0.1]], [0.5, 0.4, 0.1])
    right = solve_d(influence, prior)
    monkeypatch.setattr(slsqp, "solve", answering(answer))
    second = solve_d(influence, prior)
    assert (second.status, second.solver, second.reason) == ("solved", "clarabel", "")
    np.testing.assert_allclose(second.mixture.array(), right.mixture.array(), atol=1e-6)
    monkeypatch.setattr(conic, "solve", answering(answer))
    neither = solve_d(influence, prior)
    assert neither.mixture == prior
    assert neither.status == "fallback"
    assert neither.certificate is None
    assert reason in neither.reason
    assert neither.solver_message == "gave up"


def test_large_problems_have_a_second_solver_too(monkeypatch):
    rng = np.random.default_rng(0)
    influence, prior = named(rng.normal(size=(3, 250)), rng.dirichlet(np.ones(250)))
    solve = conic.solve

    def failing_at_first(objective, region, *, regularization=None):
        if regularization is None:
            return answering(prior.array())(objective, region)
        return solve(objective, region, regularization=regularization)

    monkeypatch.setattr(conic, "solve", failing_at_first)
    solution = solve_d(influence, prior)
    assert (solution.status, solution.solver) == ("solved", "clarabel")


def test_task_weights_and_the_paper_preset_reach_the_objective():
    influence, prior = named([[1.0, 0.0, 0.2], [0.0, 1.0, 0.2], [0.1, 0.3, 1.0]], [0.3, 0.3, 0.4])

    def solve(**options):
        return solve_d(influence, prior, constraints=FREE, **options)

    plain = solve()
    leaning = solve(task_weights={"task000": 8, "task001": 1, "task002": 1})
    assert leaning.mixture["domain000"] > plain.mixture["domain000"] + 0.05
    assert solve(task_weights=dict.fromkeys(influence.tasks, 5)).mixture == plain.mixture
    paper = solve(preset="paper")
    assert paper.gain == pytest.approx(sum(paper.gain_after.values()))
    assert plain.gain == pytest.approx(4 / 3 * sum(plain.gain_after.values()))


def test_a_solution_says_what_it_did_and_is_the_same_every_time():
    rng = np.random.default_rng(1)
    influence, prior = named(rng.normal(size=(4, 6)), np.full(6, 1 / 6))
    options = {"alpha": 0.5, "beta": 2.0, "gamma": 0.7}
    solution = solve_d(influence, prior, **options)
    assert solution == solve_d(influence, prior, **options)
    assert solution.objective == pytest.approx(
        0.5 * solution.uniformity - 2.0 * solution.gain - 0.7 * solution.diversity
    )
    assert solution.effective_domains == pytest.approx(math.exp(solution.diversity))
    for task, row in zip(influence.tasks, influence.values_VD, strict=True):
        after = row @ solution.mixture.array() / abs(row).max()
        assert solution.gain_after[task] == pytest.approx(after)
    written = json.loads(json.dumps(solution.to_json()))
    assert Mixture.from_json(written["mixture"]) == solution.mixture
    assert written["gain_before"] == solution.gain_before


@pytest.mark.parametrize(
    ("options", "named_field"),
    [
        ({"alpha": -1.0}, "alpha"),
        ({"gamma": math.nan}, "gamma"),
        ({"preset": "papers"}, "preset"),
        ({"preset": "paper", "task_weights": {"task000": 1}}, "task_weights"),
        ({"task_weights": {"other": 1}}, "task_weights"),
        ({"task_weights": {"task000": 0}}, "task_weights"),
        ({"constraints": {"max_total_variation": 0}}, "max_total_variation"),
        ({"constraints": {"max_total_variation": 1.5}}, "max_total_variation"),
        ({"constraints": {"max_total_variation": math.nan}}, "max_total_variation"),
        ({"constraints": {"upper": {"other": 0.5}}}, "other"),
        (
            {"constraints": {"upper": 0.3}},
            "domain000, upper:domain001 .* by 0.4",
        ),
        (
            {"constraints": {"lower": 0.6}},
            "domain000, lower:domain001 .* by 0.2",
        ),
        ({"constraints": {"lower": -0.1}}, "lower"),
        ({"constraints": {"lower": {"domain001": 0.5}, "upper": {"domain001": 0.4}}}, "domain001"),
    ],
)
def test_arguments_out_of_range_are_refused(options, named_field):
    def solve(constraints=None, **others):
        constraints = constraints and limited(**constraints)
        return solve_d(influence, prior, constraints=constraints, **others)

    influence, prior = named([[1.0, 0.5]], [0.5, 0.5])
    with pytest.raises(InputError, match=named_field):
        solve(**options)


def test_a_prior_over_other_domains_is_refused():
    influence, _ = named([[1.0, 0.5]], [0.5, 0.5])
    with pytest.raises(InputError, match="domain"):
        solve_d(influence, Mixture({"domain000": 1.0}))


def test_a_useless_domain_ends_below_half_its_weight():
    """Five domains that help their own task, and a bit the others; one that helps nobody."""
    rng = np.random.default_rng(0)
    prior = Mixture.uniform(["a", "b", "c", "d", "e", "noise"])
    helps_VD = np.hstack([0.7 * np.eye(5) + 0.3, np.zeros((5, 1))])
    for _ in range(3):
        measured_VD = helps_VD + 0.05 * rng.normal(size=helps_VD.shape)
        influence = InfluenceMatrix(measured_VD, domains=list(prior), tasks=list("vwxyz"))
        prior = solve_d(influence, prior).mixture.rounded()
    assert prior["noise"] < 0.5 / 6
