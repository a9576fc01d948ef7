"""The audit's statistics against a reference, and audits of mixtures whose effect is known."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from megatron_tikmix.decision.audit import Audit, RolloutOutcomes, compare, judge
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.measure.remixer import audit
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.mixture.mixture import Mixture
from tests.conftest import overridden
from tests.rollout_runs import candidates, job, rollouts_of, settled, state_digests, trained

numbers = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))


@given(
    realised=st.lists(numbers, min_size=4, max_size=12).filter(lambda x: np.std(x) > 1e-3),
    predicted=numbers,
    confidence=st.floats(0.5, 0.99),
)
def test_the_interval_is_that_of_a_t_test(
    realised: list[float], predicted: float, confidence: float
) -> None:
    found = compare(predicted, realised, confidence)
    test = stats.ttest_1samp(realised, 0.0)
    interval = test.confidence_interval(confidence)
    assert found.low == pytest.approx(interval.low, rel=1e-9, abs=1e-9)
    assert found.high == pytest.approx(interval.high, rel=1e-9, abs=1e-9)
    if abs(test.pvalue - (1 - confidence)) > 1e-6:
        beyond_noise = test.pvalue < 1 - confidence and predicted != 0
        agrees = np.sign(np.mean(realised)) == np.sign(predicted)
        expected = ("confirmed" if agrees else "contradicted") if beyond_noise else "inconclusive"
        assert found.verdict == expected
    # Both the other way round: the same verdict.
    assert compare(-predicted, [-x for x in realised], confidence).verdict == found.verdict


def test_verdicts_on_noise_alone_err_at_the_stated_rate() -> None:
    generator = np.random.default_rng(0)
    verdicts = [compare(1.0, generator.normal(size=4)).verdict for _ in range(4000)]
    wrong = verdicts.count("contradicted") / len(verdicts)
    assert 0.018 < wrong < 0.032  # 2.5%, one side of the 95% interval
    assert 0.018 < verdicts.count("confirmed") / len(verdicts) < 0.032


def test_differences_that_are_all_the_same_or_lost() -> None:
    assert compare(1.0, [0.5] * 4).verdict == "confirmed"
    assert compare(-1.0, [0.5] * 4).verdict == "contradicted"
    assert compare(1.0, [0.0] * 4).verdict == "inconclusive"
    assert compare(0.0, [0.5] * 4).verdict == "inconclusive"
    lost = compare(1.0, [0.5, math.nan, math.nan, math.inf])
    assert lost.verdict == "inconclusive"
    assert lost.to_json()["difference"] is None


def judged(old_RV: Any, new_RV: Any, predicted_V: Any, **weights: float) -> Audit:
    drops_RNV = np.stack([np.asarray(old_RV, float), np.asarray(new_RV, float)], axis=1)
    outcomes = RolloutOutcomes(drops_RNV, np.ones(2), 10, 20, 0.5)
    return judge(["t", "u"], weights or {"t": 1.0, "u": 1.0}, predicted_V, outcomes, iters=3)


OLD_RV = [[0.1, 0.2], [0.4, 0.3], [0.2, 0.2], [0.3, 0.5]]
BETTER_T_RV = [[0.2, 0.1], [0.5, 0.21], [0.31, 0.1], [0.4, 0.4]]  # t +0.10, u −0.10


def test_tasks_and_their_weighted_sum_are_judged_apart() -> None:
    found = judged(OLD_RV, BETTER_T_RV, [1.0, 1.0], t=3.0, u=1.0)
    assert (found.tasks["t"].verdict, found.tasks["u"].verdict) == ("confirmed", "contradicted")
    assert found.overall.difference == pytest.approx(0.75 * 0.1025 - 0.25 * 0.0975)
    assert (found.verdict, found.refutes) == ("confirmed", False)
    found = judged(OLD_RV, BETTER_T_RV, [1.0, 1.0], t=1.0, u=3.0)
    assert (found.verdict, found.refutes) == ("contradicted", True)
    # Better than the old one where worse was predicted: no reason to keep the old one.
    found = judged(OLD_RV, BETTER_T_RV, [-1.0, -1.0], t=3.0, u=1.0)
    assert (found.verdict, found.refutes) == ("contradicted", False)
    assert "against the prediction" in found.reason
    # As bad as was predicted: a reason all the same.
    found = judged(OLD_RV, BETTER_T_RV, [-1.0, -1.0], t=1.0, u=3.0)
    assert (found.verdict, found.refutes) == ("confirmed", True)


def test_a_new_mixture_that_loses_its_loss_is_refuted() -> None:
    lost_RV = [[math.nan, math.nan], *BETTER_T_RV[1:]]
    found = judged(OLD_RV, lost_RV, [1.0, 1.0], t=3.0, u=1.0)
    assert found.lost == (0, 1)
    assert (found.verdict, found.refutes) == ("contradicted", True)
    assert "lost their loss 1 times in 4" in found.reason
    old_RV = [[math.nan, math.nan], *OLD_RV[1:]]
    found = judged(old_RV, BETTER_T_RV, [1.0, 1.0], t=3.0, u=1.0)
    assert found.lost == (1, 0)
    assert (found.verdict, found.refutes) == ("confirmed", False)


def test_the_ledgers_row_is_plain_json() -> None:
    row = judged(OLD_RV, BETTER_T_RV, [1.0, 1.0]).to_json()
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["tasks"]["t"]["verdict"] == "confirmed"
    assert row["overall"]["verdict"] == "inconclusive"
    assert (row["repetitions"], row["iters"], row["trained_tokens"]) == (4, 3, 10)
    assert row["reason"].startswith("the audit's rollouts are inconclusive: the new mixture's loss")


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    return overridden(settings, {"model.num_layers": 2, "probe.task_samples": 4})


@pytest.fixture
def parallel(small: dict[str, Any]) -> Iterator[Parallel]:
    with job(small) as parallel:
        yield parallel


def test_an_audit_of_more_of_what_is_known_to_help(
    small: dict[str, Any], parallel: Parallel
) -> None:
    run = trained(small, parallel)
    rollouts = rollouts_of(run)
    before = settled(run)
    domains, tasks = rollouts.data.domains, rollouts.data.tasks
    old = Mixture.uniform(domains).rounded()
    new = Mixture({"low": 0.9, "high": 0.05, "junk": 0.05}).rounded()
    # In another order than the rollouts', as a matrix may come.
    right = InfluenceMatrix(
        [[1.0, 0.1, 0.2], [0.2, 2.0, 0.2]], domains=["low", "junk", "high"], tasks=["low", "high"]
    )

    def audited(influence: InfluenceMatrix, weights: dict[str, float]) -> Audit:
        found = audit(
            rollouts, old, new, influence, task_weights=weights, seed=5, iters=6, repetitions=4
        )
        assert found is not None
        return found

    found = audited(right, {"low": 1.0, "high": 1e-6})
    assert state_digests(run) == before
    assert found.verdict == found.tasks["low"].verdict == "confirmed"
    assert found.tasks["low"].predicted == pytest.approx(
        1.0 * (0.9 - 1 / 3) + 0.1 * (0.05 - 1 / 3) + 0.2 * (0.05 - 1 / 3), rel=1e-6
    )
    uniform_low_ND = candidates(domains, (1, 1, 1), (0.9, 0.05, 0.05))
    drops_RNV = rollouts.measure(uniform_low_ND, seed=5, iters=6, repetitions=4).drops_RNV
    differences_R = (drops_RNV[:, 1] - drops_RNV[:, 0])[:, tasks.index("low")]
    assert found.tasks["low"].difference == pytest.approx(differences_R.mean(), rel=1e-12)
    assert not found.refutes

    wrong = InfluenceMatrix(-right.values_VD, domains=right.domains, tasks=right.tasks)
    assert audited(wrong, {"low": 1.0, "high": 1e-6}).verdict == "contradicted"
    # What is left out of the mixture gets worse, against a prediction that it would not.
    hopeful = InfluenceMatrix(
        [[1.0, 0.1, 0.2], [1.0, 0.1, 0.2]], domains=right.domains, tasks=right.tasks
    )
    found = audited(hopeful, {"low": 1e-6, "high": 1.0})
    assert (found.verdict, found.refutes) == ("contradicted", True)
    for wrongly in ({"repetitions": 3}, {"confidence": 1.0}):
        with pytest.raises(InputError, match=next(iter(wrongly))):
            audit(rollouts, old, new, right, task_weights={}, seed=5, iters=1, **wrongly)
