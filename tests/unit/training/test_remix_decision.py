"""When a boundary resets the mixture, and when it keeps it, on banks made by hand."""

import numpy as np
import pytest

from megatron_tikmix.config import RemixConfig
from megatron_tikmix.influence.sub_batch_bank import SubBatchBank
from megatron_tikmix.mixing import Mixture
from megatron_tikmix.training.remix import Decision, Remixer

DOMAINS, TASKS = ["a", "b", "junk"], ["t", "u"]
USEFUL_VD = np.array([[1.0, 0.6, 0.0], [0.5, 1.0, 0.0]])


def decide(noise: float, prior: Mixture | None = None, **remix: object) -> Decision:
    """The decision on influence USEFUL_VD with sub-batches that scatter by `noise`."""
    values_DBV = USEFUL_VD.T[:, None, :] + noise * np.random.default_rng(0).normal(size=(3, 8, 2))
    bank = SubBatchBank(values_DBV * 64.0, np.full((3, 8), 64.0), DOMAINS, TASKS)
    return remixer(**remix)._decide(bank, 1, prior or Mixture.uniform(DOMAINS))


def remixer(**remix: object) -> Remixer:
    """One that decides, and has nothing to measure with."""
    return Remixer(
        None,
        None,
        remix=RemixConfig(**remix),
        sub_batches=8,
        seed=4321,
        task_weights=dict.fromkeys(TASKS, 1.0),
    )


def test_a_change_beyond_the_noise_is_made() -> None:
    decision = decide(noise=0.01)
    assert decision.source == "tikmix_d"
    assert decision.mixture["junk"] < 0.5 / 3
    assert decision.total_variation_noise is not None
    assert decision.mixture.total_variation(Mixture.uniform(DOMAINS)) > 0.05


def test_a_change_within_the_noise_is_not() -> None:
    settled = decide(noise=0.0, max_total_variation=None).mixture
    decision = decide(noise=0.5, prior=settled)
    assert decision.source == "kept"
    assert decision.mixture == settled
    assert decision.reason is not None
    assert "noise alone" in decision.reason
    assert decision.solution is not None
    assert decision.total_variation_noise is not None
    assert 0 < decision.solution.total_variation <= decision.total_variation_noise


def test_measured_but_not_applied() -> None:
    decision = decide(noise=0.01, apply=False)
    assert decision.source == "kept"
    assert decision.mixture == Mixture.uniform(DOMAINS)
    assert decision.solution is not None
    assert decision.solution.total_variation > 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_lost_names_its_domain_and_leaves_its_weight(bad: float) -> None:
    values_DBV = np.repeat(USEFUL_VD.T[:, None, :], 8, axis=1)
    values_DBV[1, 3, 0] = bad
    bank = SubBatchBank(values_DBV, np.ones((3, 8)), DOMAINS, TASKS)
    prior = Mixture({"a": 0.3, "b": 0.3, "junk": 0.4})
    decision = remixer()._decide(bank, 1, prior)
    assert decision.source == "tikmix_d"
    assert "the gradient of b is not finite: the weight stays" in str(decision.reason)
    assert decision.mixture["b"] == pytest.approx(0.3, abs=1e-8)
    assert decision.mixture["a"] > 0.35
    assert decision.influence is not None
    assert decision.influence.domains == ("a", "junk")


def test_a_task_whose_gradient_is_lost_is_dropped_and_named() -> None:
    values_DBV = np.repeat(USEFUL_VD.T[:, None, :], 8, axis=1)
    bank = SubBatchBank(values_DBV, np.ones((3, 8)), DOMAINS, TASKS, bad_tasks=["t"])
    decision = remixer()._decide(bank, 1, Mixture.uniform(DOMAINS))
    assert "the gradient of task t is not finite: left out" in str(decision.reason)
    assert decision.influence is not None
    assert decision.influence.tasks == ("u",)


def test_all_gradients_lost_keep_the_mixture() -> None:
    prior = Mixture.uniform(DOMAINS)
    bank = SubBatchBank(np.full((3, 8, 2), np.nan), np.ones((3, 8)), DOMAINS, TASKS)
    decision = remixer()._decide(bank, 1, prior)
    assert (decision.source, decision.mixture) == ("kept", prior)
    assert "a, b, junk is not finite" in str(decision.reason)
