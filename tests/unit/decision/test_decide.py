"""When a boundary resets the mixture, and when it keeps it, on banks made by hand."""

from typing import Any

import numpy as np
import pytest

from megatron_tikmix.config import ConstraintsConfig, RemixConfig
from megatron_tikmix.decision.decide import Boundary, Decider, Decision, completed
from megatron_tikmix.decision.ledger import Measured, StageRow
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import OWN_ROW, InfluenceMatrix, joint_influence
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup

DOMAINS, TASKS = ["a", "b", "junk"], ["t", "u"]
USEFUL_VD = np.array([[1.0, 0.6, 0.0], [0.5, 1.0, 0.0]])


def bank_of(noise: float, seed: int = 0, values_VD: np.ndarray = USEFUL_VD) -> SubBatchBank:
    """Influence USEFUL_VD in sub-batches that scatter by `noise`."""
    generator = np.random.default_rng(seed)
    values_DBV = values_VD.T[:, None, :] + noise * generator.normal(size=(3, 8, 2))
    return SubBatchBank(values_DBV * 64.0, np.full((3, 8), 64.0), DOMAINS, TASKS)


def boundary(prior: Mixture | None = None, **fields: Any) -> Boundary:
    default: dict[str, Any] = {
        "stage": 1,
        "iteration": 100,
        "prior": (prior or Mixture.uniform(DOMAINS)).rounded(),
        "consumed": dict.fromkeys(DOMAINS, 100),
        "interval_samples": 300,
        "ledger": [],
    }
    return Boundary(**{**default, **fields})


AS_PUBLISHED = {"gain": "linear", "diversity_reference": "uniform", "smoothing": 0.0}


def decider(constraints: dict[str, Any] | None = None, **remix: Any) -> Decider:
    """One that decides as the paper does, but for what is given."""
    settings = {**AS_PUBLISHED, **remix}
    limits = {"pareto": True, "max_total_variation": 0.25, **(constraints or {})}
    return Decider(
        RemixConfig(constraints=ConstraintsConfig(**limits), **settings),
        seed=4321,
        task_weights=dict.fromkeys(TASKS, 1.0),
        samples_per_epoch=dict.fromkeys(DOMAINS, 200),
    )


def decide(noise: float, at: Boundary | None = None, **remix: Any) -> Decision:
    return decider(**remix).decide(bank_of(noise), at or boundary())


def test_a_change_beyond_the_noise_is_made() -> None:
    decision = decide(noise=0.01)
    assert decision.source == "tikmix_d"
    assert decision.mixture["junk"] < 0.5 / 3
    assert decision.total_variation_noise is not None
    assert decision.mixture.total_variation(Mixture.uniform(DOMAINS)) > 0.05


def test_a_change_within_the_noise_is_not() -> None:
    settled = decide(noise=0.0, constraints={"max_total_variation": None}).mixture
    decision = decide(noise=0.5, at=boundary(settled), constraints={"pareto": False})
    assert decision.source == "kept"
    assert decision.mixture == settled
    assert decision.reason is not None
    assert "noise alone" in decision.reason
    assert decision.solution is not None
    assert decision.total_variation_noise is not None
    assert 0 < decision.solution.total_variation <= decision.total_variation_noise


def test_a_mixture_that_no_other_is_better_than_stays() -> None:
    settled = decide(noise=0.0, constraints={"max_total_variation": None}).mixture
    decision = decide(noise=0.5, at=boundary(settled))
    assert (decision.source, decision.mixture) == ("kept", settled)
    assert "those that bind: pareto:t" in (decision.reason or "")


def test_measured_but_not_applied() -> None:
    decision = decide(noise=0.01, mode="advise")
    assert decision.source == "kept"
    assert (decision.reason or "").startswith("remix.mode is advise; a change of 0.")
    assert decision.mixture == Mixture.uniform(DOMAINS).rounded()
    assert decision.solution is not None
    assert decision.solution.total_variation > 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_lost_gradient_names_its_domain_whose_weight_stays(bad: float) -> None:
    bank = bank_of(0.01)
    bank.sums_DBV[1, 3, 0] = bad
    decision = decider().decide(bank, boundary())
    assert decision.source == "tikmix_d"
    assert "the gradient of b is not finite: the weight stays" in (decision.reason or "")
    assert decision.mixture["b"] == pytest.approx(1 / 3, abs=1e-8)
    assert decision.mixture["junk"] < 0.8 / 3
    fixed_elsewhere = decider(constraints={"fixed": ["a"]}).decide(bank, boundary())
    assert fixed_elsewhere.mixture.total_variation(Mixture.uniform(DOMAINS)) < 1e-8


def test_a_lost_task_is_left_out_and_named() -> None:
    bank = bank_of(0.01)
    lost = SubBatchBank(bank.sums_DBV, bank.tokens_DB, DOMAINS, TASKS, bad_tasks=["u"])
    decision = decider().decide(lost, boundary())
    assert "the gradient of task u is not finite: left out" in (decision.reason or "")
    assert decision.influence is not None
    assert decision.influence.tasks == ("t",)


def test_where_every_gradient_is_lost_nothing_is_reset() -> None:
    bank = bank_of(0.0)
    bank.sums_DBV[:] = np.nan
    decision = decider().decide(bank, boundary())
    assert (decision.source, decision.mixture) == ("kept", boundary().prior)
    assert "a, b, junk" in (decision.reason or "")


def test_a_cap_that_the_mixture_in_force_breaks_is_not_overruled_by_noise() -> None:
    """`b` has 50 samples left for an interval of 300: at most a sixth of it."""
    at = boundary(consumed={"a": 100, "b": 350, "junk": 100})
    decision = decider(constraints={"max_epochs": 2}).decide(bank_of(0.8), at)
    assert decision.source == "tikmix_d"
    assert "breaks a constraint" in (decision.reason or "")
    assert decision.mixture["b"] <= 50 / 300 + 1e-8
    assert decision.solution is not None
    assert "max_epochs:b" in decision.solution.active_constraints
    only_measured = decider(constraints={"max_epochs": 2}, mode="advise").decide(bank_of(0.8), at)
    assert only_measured.source == "kept"


def test_caps_that_nothing_fits_keep_the_mixture_and_say_so() -> None:
    at = boundary(consumed=dict.fromkeys(DOMAINS, 390))
    decision = decider(constraints={"max_epochs": 2}).decide(bank_of(0.01), at)
    assert decision.source == "kept"
    assert "no mixture can be decided: the constraints max_epochs:a" in (decision.reason or "")


def test_constraints_are_checked_before_any_training() -> None:
    uniform = Mixture.uniform(DOMAINS)
    group = {"g": DomainGroup(domains=["a", "b"], upper=0.2)}
    with pytest.raises(InputError, match="lower:a, group_upper:g"):
        decider(constraints={"lower": {"a": 0.5}, "groups": group}).check(uniform, 300)
    with pytest.raises(InputError, match="domain nowhere"):
        decider(constraints={"max_epochs": {"nowhere": 3}}).check(uniform, 300)
    decider(constraints={"confidence": 0.9, "groups": group}).check(uniform, 300)


def test_a_confidence_makes_the_decision_more_careful() -> None:
    conflict_VD = np.array([[1.0, -0.5, 0.3], [-0.5, 1.0, 0.3]])
    bank = bank_of(0.3, values_VD=conflict_VD)
    plain = decider().decide(bank, boundary())
    careful = decider(constraints={"confidence": 0.95}).decide(bank, boundary())
    assert plain.solution is not None
    assert careful.solution is not None
    assert careful.solution.total_variation < plain.solution.total_variation


def test_diversity_is_measured_from_the_mixture_in_force_if_asked() -> None:
    nothing = bank_of(0.0, values_VD=np.zeros((2, 3)))
    prior = Mixture({"a": 0.5, "b": 0.3, "junk": 0.2})
    towards_uniform = decider().decide(nothing, boundary(prior))
    stays = decider(diversity_reference="prior").decide(nothing, boundary(prior))
    assert towards_uniform.mixture["junk"] > 0.3
    assert stays.solution is not None
    assert stays.solution.total_variation < 1e-7


def row_of(bank: SubBatchBank | None, stage: int = 0) -> StageRow:
    return StageRow(
        stage=stage,
        start_iteration=0,
        start_sample=0,
        weights=Mixture.uniform(DOMAINS),
        measured=bank and Measured(bank),
    )


def test_smoothing_averages_over_the_ledger() -> None:
    other_VD = USEFUL_VD[:, ::-1]
    ledger = [row_of(None), row_of(bank_of(0.01, 1, other_VD), 1)]
    alone = decider().decide(bank_of(0.01), boundary(ledger=ledger))
    averaged = decider(smoothing=0.5).decide(bank_of(0.01), boundary(ledger=ledger))
    assert alone.influence is not None
    assert averaged.influence is not None
    expected_VD = (USEFUL_VD + 0.5 * other_VD) / 1.5
    np.testing.assert_allclose(averaged.influence.values_VD, expected_VD, atol=0.02)
    np.testing.assert_allclose(alone.influence.values_VD, USEFUL_VD, atol=0.02)


def test_rank_stability_is_logged_against_the_boundary_before() -> None:
    first = decide(noise=0.01)
    assert first.rank_stability is None
    ledger = [row_of(bank_of(0.01, 1))]
    stable = decide(noise=0.01, at=boundary(ledger=ledger)).rank_stability
    assert stable is not None
    assert stable.correlation == {"t": 1.0, "u": 1.0}


def test_what_was_not_measured_is_completed_with_zeros() -> None:
    influence = InfluenceMatrix([[1.0]], domains=["a"], tasks=["t"], standard_error_VD=[[0.1]])
    whole = completed(influence, ["b", "a"], ["t", "u"])
    assert (whole.domains, whole.tasks) == (("a", "b"), ("t", "u"))
    np.testing.assert_array_equal(whole.values_VD, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(whole.standard_error_VD, [[0.1, 0], [0, 0]])


# TiKMiX-M --------------------------------------------------------------------------------------


def saturating(weights_ND: np.ndarray) -> np.ndarray:
    """Outcomes over DOMAINS and TASKS: what training does where gains level off."""
    return (1 - np.exp(-6 * weights_ND)) @ USEFUL_VD.T / 6


def test_tikmix_m_measures_candidates_over_the_domains_of_the_schedule() -> None:
    asked = []

    def measure(weights_ND: np.ndarray) -> np.ndarray:
        asked.append(weights_ND)
        return saturating(weights_ND)

    tikmix_m = decider(policy="tikmix_m", constraints={"max_total_variation": None})
    decision = tikmix_m.decide(bank_of(0.01), boundary(), measure)
    assert decision.source == "tikmix_m"
    (weights_ND,) = asked
    assert weights_ND.shape == (48, 3)
    # The first candidate is the mixture in force, the second TiKMiX-D's answer.
    np.testing.assert_allclose(weights_ND[0], 1 / 3, atol=1e-8)
    first = decider(constraints={"max_total_variation": None}).decide(bank_of(0.01), boundary())
    np.testing.assert_allclose(weights_ND[1], first.mixture.array(DOMAINS), atol=1e-8)
    assert decision.solution is not None
    assert decision.solution.details["mean_skill"] > 0.5


def test_tikmix_m_knows_which_domain_and_task_were_lost() -> None:
    bank = bank_of(0.01)
    bank.sums_DBV[1, 3, 0] = np.nan
    lost = SubBatchBank(bank.sums_DBV, bank.tokens_DB, DOMAINS, TASKS, bad_tasks=["u"])
    seen = []

    def measure(weights_ND: np.ndarray) -> np.ndarray:
        seen.append(weights_ND)
        return saturating(weights_ND)

    decision = decider(policy="tikmix_m").decide(lost, boundary(), measure)
    np.testing.assert_allclose(seen[0][:, 1], 1 / 3, atol=1e-8)  # the lost domain, b, is held
    assert decision.mixture["b"] == pytest.approx(1 / 3, abs=1e-8)
    assert decision.solution is not None
    assert list(decision.solution.gain_after) == ["t"]


def test_tikmix_m_by_influence_needs_no_rollouts() -> None:
    decision = decider(policy="tikmix_m", measure="gradient").decide(bank_of(0.01), boundary())
    assert decision.solution is not None
    assert decision.solution.details["candidates"] == 48
    by_d = decide(noise=0.01)
    assert decision.mixture.total_variation(by_d.mixture) < 0.15


def with_own_rows(bank: SubBatchBank, scale: float = 1.0) -> SubBatchBank:
    """The bank with each domain's own row: `junk` resembles `b`, and is as good as that to first
    order, but no part of a task."""
    gram_DD = scale * np.array([[1.0, 0.1, 0.0], [0.1, 1.0, 0.6], [0.0, 0.6, 1.0]])
    own_DBD = np.repeat(gram_DD[:, None, :], 8, axis=1) * 64.0
    return SubBatchBank(
        np.concatenate([bank.sums_DBV, own_DBD], axis=2),
        bank.tokens_DB,
        DOMAINS,
        TASKS + [OWN_ROW + name for name in DOMAINS],
    )


ALIKE_VD = np.array([[1.0, 0.1, 0.0], [0.1, 1.0, 0.6]])


def test_tikmix_m_by_influence_measures_what_d_solves_on() -> None:
    """By first-order influence junk would be worth 0.6 of b; by joint influence nothing."""
    bank = with_own_rows(bank_of(0.001, values_VD=ALIKE_VD))
    settings: dict[str, Any] = {"constraints": {"pareto": False, "max_total_variation": None}}
    by_d = decider(**settings).decide(bank, boundary())
    by_m = decider(policy="tikmix_m", measure="gradient", **settings).decide(bank, boundary())
    by_first_order = decider(**settings).decide(bank.of_tasks(TASKS), boundary())
    assert by_m.source == "tikmix_m"
    assert by_d.mixture["junk"] < 0.5 * by_first_order.mixture["junk"]
    assert by_m.mixture.total_variation(by_d.mixture) < 0.05


def test_smoothing_keeps_to_one_kind_of_influence() -> None:
    """A run may go on with the other kind: what was measured before is used as far as it goes."""
    marginal, joint = (
        bank_of(0.0, values_VD=ALIKE_VD),
        with_own_rows(bank_of(0.0, values_VD=ALIKE_VD)),
    )
    smoothing = decider(smoothing=0.5)
    for now, before, expected in (
        (joint, marginal, joint_influence(joint.influence_matrix())),
        (marginal, joint, marginal.influence_matrix()),
    ):
        decision = smoothing.decide(now, boundary(ledger=[row_of(before)]))
        assert decision.influence is not None
        assert list(decision.influence.tasks) == TASKS
        np.testing.assert_allclose(decision.influence.values_VD, expected.values_VD, atol=1e-9)


def test_a_boundary_at_which_every_task_was_lost_does_not_end_the_later_ones() -> None:
    """The rows of the domains themselves were whole."""
    for lost, now in (
        (
            with_own_rows(bank_of(0.0, values_VD=ALIKE_VD)),
            with_own_rows(bank_of(0.0, values_VD=ALIKE_VD)),
        ),
        (with_own_rows(bank_of(0.0, values_VD=ALIKE_VD)), bank_of(0.0, values_VD=ALIKE_VD)),
    ):
        lost.sums_DBV[:, :, :2] = np.nan
        smoothing = decider(smoothing=0.5)
        assert smoothing.decide(lost, boundary()).source == "kept"
        after = smoothing.decide(now, boundary(ledger=[row_of(lost)]))
        assert after.influence is not None
        assert after.mixture == smoothing.decide(now, boundary()).mixture


def test_a_domain_that_was_left_out_can_return() -> None:
    """In force without b, which is what both tasks are made of."""
    at = boundary(Mixture({"a": 0.5, "b": 0.0, "junk": 0.5}))
    bank = bank_of(0.01, values_VD=np.array([[0.1, 1.0, 0.0], [0.1, 1.0, 0.0]]))
    free = {"pareto": False, "max_total_variation": None}
    settings: dict[str, Any] = {"gain": "log", "diversity_reference": "prior"}
    assert decider(free, **settings).decide(bank, at).mixture["b"] > 0.3
    kept_out = decider({**free, "fixed": {"b": 0.0}}, **settings).decide(bank, at)
    assert kept_out.mixture["b"] == 0.0


def test_rollouts_that_fail_leave_the_answer_of_d() -> None:
    def measure(_: np.ndarray) -> np.ndarray:
        raise RolloutError("a rollout failed: out of memory")

    decision = decider(policy="tikmix_m").decide(bank_of(0.01), boundary(), measure)
    assert "a rollout failed: out of memory: the answer is TiKMiX-D's" in (decision.reason or "")
    assert decision.mixture == decide(noise=0.01).mixture


def test_a_decision_is_the_same_every_time() -> None:
    first, second = (decide(noise=0.2) for _ in range(2))
    assert first.mixture == second.mixture
    assert first.total_variation_noise == second.total_variation_noise


# Other ranks than the main one --------------------------------------------------------------------


def test_what_cannot_be_ruled_on_is_a_decision_for_the_others_wait() -> None:
    at = boundary(interval_samples=0)
    decision = decider({"max_epochs": 2.0}).decide(bank_of(0.01), at)
    assert (decision.source, decision.mixture) == ("kept", at.prior)
    assert "no mixture can be decided: epoch_caps: interval_tokens is 0" in (decision.reason or "")
    assert decision.measured is not None


def test_a_budget_is_made_on_ranks_that_do_not_know_what_was_consumed() -> None:
    decider({"max_epochs": 2.0}).budget(boundary(consumed={}), 0.05)
