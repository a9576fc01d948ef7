import json

import numpy as np
import pytest
from scipy.optimize import minimize

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup
from megatron_tikmix.solve.objective import Objective
from tests.solving import limited, solve_d, solve_m

FREE = limited(max_total_variation=None, pareto=False)
QUICK = {"candidates": 32, "rounds": 12, "samples": 300}


class Saturating:
    """Tasks whose gain saturates in each weight, f_i(w) = Σ_j a_ij (1 − e^{−λ w_j})/λ.

    The influence is its gradient at the prior: what a probe would find there.
    """

    def __init__(self, seed, tasks=2, domains=6, rate=8.0, noise=0.05):
        self.rng = np.random.default_rng(seed)
        self.worth_VD = self.rng.exponential(size=(tasks, domains))
        self.worth_VD *= self.rng.random((tasks, domains)) < 0.7
        self.worth_VD[:, 0] += 0.3
        self.rate, self.noise = rate, noise
        self.prior_D = self.rng.dirichlet(np.full(domains, 5.0))
        self.slopes_VD = self.worth_VD * np.exp(-rate * self.prior_D)
        names = [f"domain{d}" for d in range(domains)]
        self.influence = InfluenceMatrix(
            self.slopes_VD, domains=names, tasks=[f"task{v}" for v in range(tasks)]
        )
        self.prior = Mixture(dict(zip(names, self.prior_D.tolist(), strict=True)))
        self.asked = []

    def gains(self, weights_ND):
        return (1 - np.exp(-self.rate * weights_ND)) @ self.worth_VD.T / self.rate

    def probe(self, weights_ND):
        self.asked.append(weights_ND)
        gains_NV = self.gains(weights_ND)
        noise_NV = self.rng.normal(size=gains_NV.shape)
        return gains_NV + self.noise * gains_NV.std(axis=0) * noise_NV

    def optimum(self, gamma):
        """The best of several descents on the exact objective, in units in which the prior gains
        what its influence says."""
        linear_V = self.slopes_VD @ self.prior_D / self.slopes_VD.max(axis=1)
        unit_V = linear_V / self.gains(self.prior_D)

        def objective(weights_D):
            gains_V = unit_V * self.gains(weights_D)
            positive_D = weights_D.clip(min=1e-12)
            entropy = -(positive_D * np.log(positive_D)).sum()
            return gains_V.std() - 4 * gains_V.mean() - gamma * entropy

        D = len(self.prior_D)
        starts = np.vstack([self.prior_D, np.random.default_rng(0).dirichlet(np.ones(D), 4)])
        total = {"type": "eq", "fun": lambda w: w.sum() - 1}
        found = [
            minimize(objective, w, bounds=[(0, 1)] * D, constraints=[total], method="SLSQP")
            for w in starts
        ]
        return min(found, key=lambda answer: answer.fun).x


def distance(mixture, weights_D):
    return 0.5 * abs(mixture.array() - weights_D).sum()


def test_rollouts_bring_it_closer_to_the_true_optimum_than_influence_does():
    # Were M no better than D, it would be closer in all six with a chance of 1.6%.
    of_d, of_m = [], []
    for seed in range(6):
        case = Saturating(seed)
        optimum_D = case.optimum(gamma=0.5)
        d = solve_d(case.influence, case.prior, gamma=0.5, constraints=FREE)
        m = solve_m(
            case.influence,
            case.prior,
            measure=case.probe,
            gamma=0.5,
            constraints=FREE,
            seed=seed,
            **QUICK,
        )
        assert m.solver == "dirichlet", m.reason
        of_d.append(distance(d.mixture, optimum_D))
        of_m.append(distance(m.mixture, optimum_D))
    assert all(m < d for m, d in zip(of_m, of_d, strict=True))
    assert np.mean(of_m) < 0.5 * np.mean(of_d)


def test_with_the_influence_itself_it_agrees_with_d():
    case = Saturating(1, tasks=1)
    d = solve_d(case.influence, case.prior, constraints=FREE)
    m = solve_m(case.influence, case.prior, constraints=FREE, **QUICK)
    assert m.details["mean_skill"] > 0.99
    objective = Objective.of(case.influence.values_VD)
    assert objective.value(m.mixture.array()) < d.objective + 0.03
    assert m.mixture.total_variation(d.mixture) < 0.06
    # What it predicts is in D's units.
    gained = float(objective.rows_VD[0] @ m.mixture.array())
    assert m.gain_after["task0"] == pytest.approx(gained, abs=0.05)
    assert m.gain_before["task0"] == pytest.approx(d.gain_before["task0"], abs=0.05)


def test_what_is_measured_and_how_it_is_told():
    case = Saturating(2)
    solution = solve_m(case.influence, case.prior, measure=case.probe, **QUICK)
    (asked_ND,) = case.asked
    assert asked_ND.shape == (32, 6)
    np.testing.assert_allclose(asked_ND.sum(axis=1), 1, atol=1e-9)
    d_D = solve_d(case.influence, case.prior).mixture.array()
    np.testing.assert_allclose(asked_ND[:2], [case.prior_D, d_D], atol=1e-12)
    lower_D = np.minimum(d_D / 2, case.prior_D)
    upper_D = np.maximum(2 * d_D, case.prior_D)
    assert (asked_ND >= lower_D - 1e-9).all()
    assert (asked_ND <= upper_D + 1e-9).all()
    assert (0.5 * abs(asked_ND - case.prior_D).sum(axis=1) <= 0.25 + 1e-8).all()

    assert solution.status == "solved"
    assert solution.certificate is None
    details = solution.details
    assert details["candidates"] == 32
    assert details["not_measured"] == 0
    assert list(details["skill"]) == ["task0", "task1"]
    assert all(0.5 < skill["spearman"] <= 1 for skill in details["skill"].values())
    concentrations = [row["concentration"] for row in details["rounds"]]
    ratios = np.diff(np.log(concentrations))
    np.testing.assert_allclose(ratios, ratios[0])
    assert ratios[0] > 0
    predicted = details["predicted_objective"]
    assert predicted["answer"] == pytest.approx(solution.objective)
    json.dumps(solution.to_json(), allow_nan=False)


def test_constraints_are_those_of_d():
    case = Saturating(3, tasks=2)
    names = case.influence.domains
    constraints = limited(
        upper={names[1]: 0.9 * case.prior[names[1]] + 0.02},
        fixed=[names[2]],
        groups={"some": DomainGroup(domains=names[3:5], upper=sum(case.prior_D[3:5]))},
        epoch_caps={names[0]: case.prior[names[0]] + 0.02},
        max_total_variation=0.15,
    )
    m = solve_m(
        case.influence, case.prior, measure=case.probe, constraints=constraints, gamma=0.3, **QUICK
    )
    assert m.solver == "dirichlet", m.reason
    weights = m.mixture
    assert weights[names[1]] <= constraints.upper[names[1]] + 1e-8
    assert weights[names[2]] == pytest.approx(case.prior[names[2]], abs=1e-8)
    assert weights[names[3]] + weights[names[4]] <= sum(case.prior_D[3:5]) + 1e-8
    assert weights[names[0]] <= case.prior[names[0]] + 0.02 + 1e-8
    assert m.total_variation <= 0.15 + 1e-8
    for task, before in m.gain_before.items():
        assert m.gain_after[task] >= before - 1e-8
    assert "fixed:domain2" in m.active_constraints


def test_orders_and_units_do_not_matter():
    case = Saturating(4, noise=0.0)
    order, tasks = [3, 1, 5, 0, 2, 4], [1, 0]
    shuffled = InfluenceMatrix(
        case.influence.values_VD[np.ix_(tasks, order)],
        domains=[case.influence.domains[d] for d in order],
        tasks=[case.influence.tasks[v] for v in tasks],
    )

    def shuffled_probe(weights_ND):
        return case.probe(weights_ND[:, np.argsort(order)])[:, tasks]

    one = solve_m(case.influence, case.prior, measure=case.probe, **QUICK)
    other = solve_m(shuffled, case.prior, measure=shuffled_probe, **QUICK)
    assert one.mixture == other.mixture
    assert one == solve_m(case.influence, case.prior, measure=case.probe, **QUICK)
    scaled = solve_m(
        case.influence, case.prior, measure=lambda w: case.probe(w) * [1e-7, 1e5], **QUICK
    )
    assert scaled.mixture.total_variation(one.mixture) < 0.02


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda gains, rng: rng.normal(size=gains.shape), "below min_skill, 0.5"),
        (lambda gains, rng: np.where(rng.random((32, 1)) < 0.8, np.nan, gains), "of 32 candidates"),
        (lambda gains, rng: np.zeros_like(gains), "below min_skill, 0.5"),
    ],
)
def test_answer_of_d_where_nothing_can_be_learnt(spoil, reason):
    case = Saturating(5)
    rng = np.random.default_rng(0)
    d = solve_d(case.influence, case.prior)
    m = solve_m(case.influence, case.prior, measure=lambda w: spoil(case.probe(w), rng), **QUICK)
    assert m.mixture == d.mixture
    assert reason in m.reason
    assert "the answer is TiKMiX-D's" in m.reason
    assert (m.solver, m.certificate) == (d.solver, d.certificate)
    json.dumps(m.to_json(), allow_nan=False)


def test_a_few_candidates_that_fail_are_left_out():
    case = Saturating(6)

    def probe(weights_ND):
        outcomes_NV = case.probe(weights_ND)
        outcomes_NV[[3, 9], 0] = np.nan
        return outcomes_NV

    m = solve_m(case.influence, case.prior, measure=probe, **QUICK)
    assert m.details["not_measured"] == 2
    assert m.solver == "dirichlet"


def test_no_room_means_the_answer_of_d():
    only = Mixture({"all": 1.0})
    influence = InfluenceMatrix([[1.0]], domains=["all"], tasks=["task"])
    m = solve_m(influence, only)
    assert m.mixture == only
    assert "no room" in m.reason


def test_bad_arguments_are_told_in_a_sentence():
    case = Saturating(7)
    for options, message in [
        ({"candidates": 15}, "at least 16"),
        ({"min_skill": 2}, "min_skill is 2"),
        ({"rounds": 0}, "rounds, samples and top"),
        ({"samples": 10, "top": 11}, "rounds, samples and top"),
        ({"concentrations": (100.0, 1.0)}, "must be positive and rise"),
        ({"scales": (2.0, 3.0)}, "0 ≤ least ≤ 1 ≤ most"),
        ({"seed": -1}, "seed is -1"),
        ({"alpha": -1}, "alpha is -1"),
        ({"measure": lambda w: np.zeros(3)}, "32 candidates and 2 tasks need"),
    ]:
        with pytest.raises(InputError, match=message):
            solve_m(case.influence, case.prior, **{**QUICK, **options})
