"""`why` is of what was solved: pushes balance, and their parts add up to the change."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tikmix.decision.explain import Explainer
from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.decision.rules import Rules
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup, MixtureConstraints
from megatron_tikmix.solve.objective import Goal, floored
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d


def stages(
    influence_VD: np.ndarray, prior: Mixture, goal: Goal, constraints: MixtureConstraints
) -> tuple[StageRow, StageRow]:
    """The stage before, and one that was solved, as read back from JSON."""
    tasks = tuple(f"t{v}" for v in range(len(influence_VD)))
    influence = InfluenceMatrix(
        influence_VD,
        domains=list(prior),
        tasks=tasks,
        standard_error_VD=0.01 * np.abs(influence_VD),
    )
    solution = solve_tikmix_d(influence, prior, goal, constraints)
    rules = Rules(policy="tikmix_d", goal=goal, constraints=constraints, tasks=tasks)
    former = StageRow(stage=0, start_iteration=0, start_sample=0, weights=prior)
    row = StageRow(
        stage=1,
        start_iteration=10,
        start_sample=80,
        weights=solution.mixture.to_json(),
        source="tikmix_d",
        influence=influence,
        solution=solution,
        rules=rules,
    )
    return former, StageRow.from_json(json.loads(json.dumps(row.to_json())))


def drawn(seed: int) -> tuple[StageRow, StageRow]:
    """A random goal and random constraints; domains that were left out among those in force."""
    rng = np.random.default_rng(seed)
    D, V = int(rng.integers(3, 12)), int(rng.integers(1, 6))
    names = [f"d{d}" for d in range(D)]
    prior_D = rng.dirichlet(np.full(D, rng.choice([0.3, 1, 5])))
    if D > 2 and rng.integers(2):
        prior_D[rng.integers(D)] = 0.0
        prior_D /= prior_D.sum()
    prior = Mixture(dict(zip(names, prior_D.tolist(), strict=True)))
    other = Mixture(dict(zip(names, rng.dirichlet(np.full(D, 2.0)).tolist(), strict=True)))
    goal = Goal(
        alpha=float(rng.choice([0, 0.5, 1])),
        gamma=float(rng.choice([0.3, 1, 2])),
        gain=str(rng.choice(["linear", "log"])),  # type: ignore[arg-type]
        reference=(floored(prior), other, None)[rng.integers(3)],
    )
    kind = rng.integers(4)
    constraints = (
        MixtureConstraints(),
        MixtureConstraints(upper=float(max(0.3, 1.5 / D))),
        MixtureConstraints(max_total_variation=0.1, pareto=True),
        MixtureConstraints(groups={"some": DomainGroup(domains=names[:2], upper=0.5)}),
    )[kind]
    influence_VD = rng.normal(size=(V, D))
    return stages(influence_VD, prior, goal, constraints)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_parts_add_up_to_the_change_and_constraints_push_where_they_bind(seed: int) -> None:
    former, row = drawn(seed)
    assert row.solution is not None
    explainer = Explainer(former, row)
    for domain in row.weights:
        found = explainer.of(domain)
        change = found.change
        assert change is not None
        assert change.total == pytest.approx(
            row.solution.mixture[domain] - former.weights[domain], abs=1e-15
        )
        parts = [*change.gain.values(), change.uniformity, change.constraints, change.diversity]
        summed = sum([*parts, change.shared, change.search])
        if row.solution.certificate is not None:
            assert change.search == 0
            assert summed == pytest.approx(change.total, abs=1e-4)
        else:
            assert summed == pytest.approx(change.total, abs=1e-9)
        if not found.active_constraints and row.solution.certificate is not None:
            assert found.constraints == 0
            assert change.constraints == 0
        if not row.solution.active_constraints and row.solution.certificate is not None:
            assert found.shared == pytest.approx(0, abs=1e-3)


def test_a_domain_that_returns_from_below_the_floor_is_not_credited_to_constraints() -> None:
    prior = Mixture({"a": 1.0, "b": 0.0})
    goal = Goal.of_preset("default", prior)
    former, row = stages(np.array([[0.2, 1.0]]), prior, goal, MixtureConstraints())
    found = Explainer(former, row).of("b")
    assert found.after > 1e-3
    assert found.change is not None
    assert found.change.constraints == 0
    assert found.change.diversity == pytest.approx(1e-4 / 2, rel=1e-3), "to the floor"
    assert found.change.gain["t0"] > 0
