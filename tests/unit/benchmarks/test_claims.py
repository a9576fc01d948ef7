"""The figures of benchmarks/claims, on runs made by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from claims import figures, online, searches
from claims.checks import misses
from claims.policies import Outcome, Policy
from claims.profile import Profile


def run(loss: float, curve: list[tuple[int, float]] | None = None) -> dict:
    points = [[tokens, {"t": value, "u": value}] for tokens, value in curve or [(100, loss)]]
    return {
        "task_loss": {"t": loss - 0.1, "u": loss + 0.1, "never": 9.0},
        "curve": points,
        "tokens": points[-1][0],
        "flops": 1000.0,
        "decision_flops": 50.0,
        "decision_seconds": 1.0,
    }


UNIFORM, BEST = [run(4.0), run(4.2), run(4.1)], [run(3.5), run(3.8), run(3.5)]


def test_the_gap_closed_is_0_for_uniform_and_1_for_the_best_static_mixture() -> None:
    tasks = ["t", "u"]
    assert figures.gap_closed(UNIFORM, UNIFORM, BEST, tasks).mean == pytest.approx(0)
    assert figures.gap_closed(BEST, UNIFORM, BEST, tasks).mean == pytest.approx(1)
    halfway = [run(3.75), run(4.0), run(3.8)]
    assert figures.gap_closed(halfway, UNIFORM, BEST, tasks).mean == pytest.approx(0.5)


def test_a_paired_difference_has_the_interval_of_a_paired_t_test() -> None:
    found = figures.difference(BEST, UNIFORM, ["t", "u"])
    test = ttest_rel(figures.losses(BEST, ["t", "u"]), figures.losses(UNIFORM, ["t", "u"]))
    interval = test.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_tokens_to_uniforms_loss_are_interpolated() -> None:
    faster = [run(3.0, [(0, 7.0), (50, 5.0), (100, 3.0)])]
    assert figures.tokens_to_reach(faster, [run(4.0)], ["t", "u"]).mean == pytest.approx(0.75)
    assert figures.tokens_to_reach([run(4.5)], [run(4.0)], ["t", "u"]) is None


def test_a_choice_before_the_run_is_paid_for() -> None:
    choice = searches.Choice({"a": 1.0}, flops=2000.0, seconds=7.0)
    flops, seconds, share = figures.decision_cost(Outcome(Policy("p", choice=choice), UNIFORM))
    assert (flops, seconds, share) == (2050.0, 8.0, 2.05)


def test_the_law_of_effective_tokens_is_found_again() -> None:
    """Losses made by it: its optimum is that of the fit, and better than uniform."""
    generator = np.random.default_rng(0)
    transfer_VD = np.array([[1.0, 0.0, 0.3, 0.0], [0.1, 1.0, 0.0, 0.0]])
    truth = searches.EffectiveTokens(transfer_VD, np.array([0.3, 0.2]))
    weights_ND = generator.dirichlet(np.ones(4), 40)
    names = ["a", "b", "c", "junk"]
    mixtures = [dict(zip(names, w.tolist(), strict=True)) for w in weights_ND]
    losses_NV = 4 - truth.slope_V * np.log(truth.floor + weights_ND @ transfer_VD.T)
    results = [{"task_loss": {"t": float(a), "u": float(b)}} for a, b in losses_NV]
    fitted = searches.EffectiveTokens.fitted(mixtures, results, names, ["t", "u"])
    np.testing.assert_allclose(fitted.optimum(), truth.optimum(), atol=0.03)
    assert truth.optimum()[3] < 1e-4


def test_odm_follows_its_formula() -> None:
    policy = online.ODM(["a", "b"], smoothing=0.9)
    weights = policy.next({"a": 3.0, "b": 1.0})
    rewards = 0.1 * np.array([3.0, 1.0]) / 0.5
    softmax = np.exp(0.5 * rewards) / np.exp(0.5 * rewards).sum()
    explore = min(0.5, np.sqrt(np.log(2) / 2))
    np.testing.assert_allclose(weights, (1 - 2 * explore) * softmax + explore)
    assert policy.next({"a": 3.0})[0] > 0.5  # b was not drawn, and keeps its reward


def test_doremi_raises_what_is_worse_than_the_reference() -> None:
    policy = online.DoReMi(["a", "b"], reference={"a": 2.0, "b": 2.0}, smoothing=0.0)
    weights = policy.next({"a": 3.0, "b": 1.0})  # b is better than the reference: no excess
    np.testing.assert_allclose(weights, np.array([np.e, 1]) / (np.e + 1))
    assert policy.mean()["a"] == pytest.approx(np.e / (np.e + 1))


@pytest.mark.parametrize("path", sorted((Path(searches.__file__).parent / "profiles").iterdir()))
def test_profiles_keep_seeds_that_choose_apart_from_those_that_judge(path: Path) -> None:
    profile = Profile.load(path.stem)
    assert profile.search_seed not in profile.seeds
    assert profile.tasks
    assert profile.unseen_tasks


def test_missed_goals_are_told() -> None:
    good = {"all": {"r": 0.9, "low": 0.6}}
    assert misses({"outcomes": good}) == []
    (sentence,) = misses({"outcomes": {"all": {"r": 0.9, "low": 0.4}}})
    assert "0.40" in sentence
