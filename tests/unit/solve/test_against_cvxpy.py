"""TiKMiX-D against the same problem stated in cvxpy and solved by solvers that it does not use."""

import math
import warnings

import cvxpy as cp
import numpy as np
import pytest
from scipy.stats import t as student_t

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup
from tests.solving import limited, solve_d

CASES, CHUNK = 200, 25
B = 8  # sub-batches behind the standard errors


def random_case(seed):
    """D from 1 to 200, V from 1 to 30, of the kinds that are hard, with all constraints."""
    rng = np.random.default_rng(seed)
    D, V = int(rng.integers(1, 201)), int(rng.integers(1, 31))
    influence_VD = rng.normal(size=(V, D))
    kind = seed % 7
    if kind == 1:
        influence_VD = -abs(influence_VD)  # rows all negative
    elif kind == 2:
        influence_VD = abs(influence_VD[:1]) + 0.1 * influence_VD  # tasks that agree
    elif kind == 3:
        influence_VD[:, -1] = 0
    elif kind == 4:
        influence_VD[-1] = 0  # a zero row
    elif kind == 5:
        influence_VD[:, -1] = influence_VD[:, 0]  # duplicate domains
    influence_VD *= 10.0 ** rng.uniform(-9, 9, (V, 1))
    names = [f"domain{d:03}" for d in range(D)]
    tasks = [f"task{v:02}" for v in range(V)]
    prior_D = rng.dirichlet(np.full(D, rng.choice([0.3, 1, 10])))
    prior = Mixture(dict(zip(names, prior_D.tolist(), strict=True)))
    largest_V1 = abs(influence_VD).max(axis=1, keepdims=True)
    errors_VD = largest_V1 * rng.uniform(0.02, 0.3) * rng.uniform(0.5, 1.5, influence_VD.shape)
    coned = seed % 4 == 0
    influence = InfluenceMatrix(
        influence_VD,
        domains=names,
        tasks=tasks,
        standard_error_VD=errors_VD if coned else None,
        degrees_of_freedom=B - 1 if coned else None,
    )
    constraints = {
        "max_total_variation": rng.choice([None, 0.25, 0.25, 0.05]),
        "pareto": coned or bool(rng.integers(4)),
        "confidence": 0.95 if coned else None,
        "pareto_slack": float(rng.choice([0, 0, 0.01])),
    }
    if seed % 3 == 1 and D > 8:  # around the prior, so that they can be kept
        half = names[: D // 2]
        of_half = math.fsum(prior[name] for name in half)
        constraints |= {
            "lower": {names[0]: 0.9 * prior[names[0]], names[1]: 0.5 * prior[names[1]]},
            "upper": {names[2]: min(1.0, 1.1 * prior[names[2]])},
            "fixed": [names[3]],
            "groups": {"half": DomainGroup(domains=half, lower=0.95 * of_half, upper=of_half)},
        }
    options = {
        "alpha": float(rng.choice([0, 1, 1, 3])),
        "gamma": float(rng.choice([1, 1, 0.5, 0.25, 0.05])),
        "preset": "paper" if seed % 5 == 0 else None,
        "gain": "log" if seed % 5 in (1, 3) else "linear",
        "constraints": limited(**constraints),
        "diversity_reference": prior if seed % 6 == 0 else None,
    }
    return influence, prior, options


def stated_in_cvxpy(influence, prior, options):
    """The problem of method.md, section 2, in cvxpy's own words."""
    values_VD, constraints = influence.values_VD, options["constraints"]
    kept_V = abs(values_VD).max(axis=1) > 0
    largest_V1 = abs(values_VD[kept_V]).max(axis=1, keepdims=True)
    rows_VD, V = values_VD[kept_V] / largest_V1, max(int(kept_V.sum()), 1)
    prior_D = prior.array(influence.domains)
    w = cp.Variable(len(prior_D), name="w")
    gains = rows_VD @ w
    if options["diversity_reference"] is None:
        divergence = -cp.sum(cp.entr(w))
    else:
        divergence = cp.sum(cp.rel_entr(w, prior_D))
    limits = [cp.sum(w) == 1, w >= 0]
    if options["gain"] == "log":
        below = cp.Variable(gains.shape[0])  # what is below 0.05 counts along the tangent there
        limits.append(below <= 0)
        worth = cp.sum(1 + cp.log(gains - below) + below / 0.05)
    else:
        worth = cp.sum(gains)
    objective = (
        options["alpha"] * cp.norm(gains - cp.sum(gains) / V) / math.sqrt(V)
        - (V if options["preset"] == "paper" else 4) * worth / V
        + options["gamma"] * divergence
    )
    if constraints.max_total_variation is not None:
        limits.append(cp.norm1(w - prior_D) <= 2 * constraints.max_total_variation)
    if constraints.confidence is not None:
        level = 1 - (1 - constraints.confidence) / len(influence.tasks)
        noise_VD = influence.standard_error_VD[kept_V] / largest_V1 * student_t.ppf(level, B - 1)
        limits += [
            row_D @ (w - prior_D) + constraints.pareto_slack
            >= cp.norm(cp.multiply(noise_D, w - prior_D))
            for row_D, noise_D in zip(rows_VD, noise_VD, strict=True)
        ]
    elif constraints.pareto:
        limits.append(rows_VD @ (w - prior_D) >= -constraints.pareto_slack)
    index = {name: d for d, name in enumerate(influence.domains)}
    if constraints.groups:
        limits += [w[index[name]] >= least for name, least in constraints.lower.items()]
        limits += [w[index[name]] <= most for name, most in constraints.upper.items()]
        limits += [w[index[name]] == prior[name] for name in constraints.fixed]
        for group in constraints.groups.values():
            total = cp.sum(w[[index[name] for name in group.domains]])
            limits += [total >= group.lower, total <= group.upper]
    return cp.Problem(cp.Minimize(objective), limits)


def _weights(problem):
    return next(variable for variable in problem.variables() if variable.name() == "w")


def broken_by(problem, weights_D):
    """By how much these weights break the worst of cvxpy's constraints."""
    w = _weights(problem)
    w.value = weights_D
    limits = [limit for limit in problem.constraints if all(v is w for v in limit.variables())]
    return max(float(np.max(limit.violation(), initial=0.0)) for limit in limits)


def reference_value(problem):
    """The optimum by ECOS, at the strictest tolerance of which it is sure, and by how much its
    mixture breaks the worst constraint; None if of none."""
    for tolerance in (1e-10, 1e-8):
        settings = dict.fromkeys(("abstol", "reltol", "feastol"), tolerance)
        try:
            problem.solve(solver="ECOS", max_iters=500, **settings)
        except cp.SolverError:
            continue
        if problem.status == cp.OPTIMAL:
            w = _weights(problem)
            w.value = np.maximum(w.value, 0)  # −1e-15 would have no entropy
            broken = max(
                float(np.max(limit.violation(), initial=0.0)) for limit in problem.constraints
            )
            return problem.objective.value, broken
    return None


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_the_optimum_is_that_of_another_solver(first):
    unsure = 0
    for seed in range(first, first + CHUNK):
        influence, prior, options = random_case(seed)
        solution = solve_d(influence, prior, **options)
        assert solution.status == "solved", f"seed {seed}: {solution.reason}"
        problem = stated_in_cvxpy(influence, prior, options)
        assert broken_by(problem, solution.mixture.array(influence.domains)) <= 1e-8, seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not sure is in its status too
            expected = reference_value(problem)
        if expected is None:
            unsure += 1
        else:
            # With logarithms ECOS stops early, and its mixtures break constraints by up to 1e-6.
            value, broken = expected
            least, most = value - 1e-6, value + 1e-6 + 30 * broken
            if options["gain"] == "log":
                least -= 3e-5
            assert least <= solution.objective <= most, f"seed {seed}"
    assert unsure <= CHUNK // 8, "too few cases were compared"
