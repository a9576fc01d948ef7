"""Rows go to the disk and come back to the bit; what is damaged costs what only it could tell."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tikmix.config import ConstraintsConfig
from megatron_tikmix.decision.audit import judge
from megatron_tikmix.decision.decide import History, decide_again
from megatron_tikmix.decision.ledger import BankFile, Ledger, Measured, StageRow, filed
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup, MixtureConstraints
from tests.decided_run import DOMAINS, TASKS, TRUTH_VD, bank_of, run


def saturating(weights_ND: np.ndarray) -> np.ndarray:
    return (1 - np.exp(-6 * weights_ND)) @ TRUTH_VD.T / 6


LIMITS = ConstraintsConfig(
    max_epochs={"a": 2.0},
    upper={"junk": 0.9},
    groups={"two": DomainGroup(domains=["a", "b"], lower=0.2)},
    max_total_variation=0.2,
)
SETTINGS: list[dict[str, Any]] = [
    {},
    {"joint": False},
    {"constraints": LIMITS},
    {"preset": "paper", "joint": False},
    {"mode": "advise"},
    {"policy": "tikmix_m", "measure": saturating},
    {"policy": "tikmix_m"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_stage_of_a_run_is_decided_again_from_its_files(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    if settings.get("preset") == "paper":  # the raw sum has no weights, and there are none to give
        settings = {**settings, "constraints": ConstraintsConfig(max_total_variation=0.3)}
    _, made = run(tmp_path, **settings)
    ledger = Ledger.read(tmp_path)
    assert len(ledger) == 3
    for stage, decision in enumerate(made, start=1):
        again = decide_again(ledger, stage)
        assert again.mixture == decision.mixture
        assert (again.source, again.reason) == (decision.source, decision.reason)
        assert again.total_variation_noise == decision.total_variation_noise
        assert again.solution == decision.solution
        assert again.rank_stability == decision.rank_stability
        assert again.influence is not None
        assert decision.influence is not None
        np.testing.assert_array_equal(again.influence.values_VD, decision.influence.values_VD)


def test_what_if() -> None:
    ledger, made = run(None)
    rules = ledger[1].rules
    assert rules is not None
    wider = decide_again(ledger, 1, goal=replace(rules.goal, gamma=20.0)).mixture
    assert wider.total_variation(ledger[0].mixture) < 0.1
    assert made[0].mixture.total_variation(ledger[0].mixture) > 0.2
    held = decide_again(ledger, 1, constraints=MixtureConstraints(fixed={"junk": 0.3}))
    assert held.mixture["junk"] == pytest.approx(0.3, abs=1e-6)
    other = decide_again(ledger, 1, goal=replace(rules.goal, task_weights={"t": 1.0, "u": 0.01}))
    assert other.mixture["b"] > made[0].mixture["b"]


def test_a_row_reads_back_to_the_bit(tmp_path: Path) -> None:
    ledger, _ = run(tmp_path, policy="tikmix_m", measure=saturating, constraints=LIMITS)
    rng = np.random.default_rng(0)
    from megatron_tikmix.decision.audit import RolloutOutcomes

    outcomes = RolloutOutcomes(rng.normal(size=(4, 2, 2)), np.ones(2), 100, 50, 1.5)
    audit = judge(TASKS, {"t": 1.0, "u": 2.0}, [0.1, 0.2], outcomes, iters=3)
    for row in [*ledger, replace(ledger[1], audit=audit)]:
        text = json.dumps(row.to_json(), allow_nan=False)
        read = StageRow.from_json(json.loads(text), tmp_path)
        assert json.dumps(read.to_json()) == text
        assert read.mixture == row.mixture
        assert read.solution == row.solution
        assert read.rules == StageRow.from_json(row.to_json()).rules
    assert (tmp_path / "mixture.jsonl").read_text().splitlines() == [
        json.dumps(row.to_json()) for row in ledger
    ]


def test_a_bank_file_reads_back_to_the_bit_also_what_is_not_finite(tmp_path: Path) -> None:
    bank = bank_of(3)
    bank.sums_DBV[1, 2, 0] = np.nan
    lost = SubBatchBank(bank.sums_DBV, bank.tokens_DB, DOMAINS, TASKS, bad_tasks=["u"])
    read = BankFile.written(tmp_path, 3, Measured(lost)).read().bank
    np.testing.assert_array_equal(read.sums_DBV, lost.sums_DBV)
    np.testing.assert_array_equal(read.tokens_DB, lost.tokens_DB)
    assert (read.domains, read.tasks, read.bad_tasks) == (lost.domains, lost.tasks, ("u",))


@pytest.mark.parametrize("damage", ["missing", "another", "cut"])
def test_a_lost_bank_costs_its_part_and_no_more(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, stages=3)
    ledger = Ledger.read(tmp_path)
    reference = ledger[2].measured
    assert isinstance(reference, BankFile)
    path = tmp_path / reference.name
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-9] if damage == "cut" else content + b"more")
    with caplog.at_level(logging.WARNING):
        later = decide_again(ledger, 3)
    assert later.influence is not None, "the others are averaged all the same"
    (message,) = {record.getMessage() for record in caplog.records}
    assert path.name in message
    assert "decisions go on without it" in message
    with pytest.raises(InputError, match=path.name):
        decide_again(ledger, 2)


def test_rows_of_earlier_versions_are_read_and_say_what_they_lack(tmp_path: Path) -> None:
    ledger, _ = run(None)
    old = []
    for row in ledger:
        plain = row.to_json()
        for name in ("schema", "rules"):
            del plain[name]
        old.append(plain)
    (tmp_path / "mixture.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    read = Ledger.read(tmp_path)
    assert [row.mixture for row in read] == [row.mixture for row in ledger]
    measured, before = read[2].read_measured(), ledger[2].read_measured()
    assert measured is not None
    assert before is not None
    np.testing.assert_array_equal(measured.bank.sums_DBV, before.bank.sums_DBV)
    with pytest.raises(InputError, match=r"stage 2 .* lacks the goal and the constraints"):
        decide_again(read, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "stage 1 .* schema 99, and this version reads up to 2"),
        ({"weights": None}, "stage 1 .* has no weights"),
        ({"solution": {"mixture": {}}}, "stage 1 of the ledger cannot be read: KeyError"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rows = [row.to_json() for row in run(None, stages=1)[0]]
    rows[1] |= change
    (tmp_path / "mixture.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=message):
        Ledger.read(tmp_path)


def test_stages_that_cannot_be_decided_again_are_refused_in_a_sentence() -> None:
    ledger, _ = run(None, stages=1)
    for stage in (0, 5):
        with pytest.raises(InputError, match=f"stage {stage} was not decided"):
            decide_again(ledger, stage)
    kept = StageRow(
        stage=2, start_iteration=20, start_sample=160, weights=ledger[1].weights, reason="so it is"
    )
    ledger.append(kept)
    with pytest.raises(InputError, match="nothing was measured for it: so it is"):
        decide_again(ledger, 2)


def test_the_same_bank_makes_the_same_file_and_another_never_takes_its_name(tmp_path: Path) -> None:
    row = run(None, stages=1)[0][1]
    first, second = filed(row, tmp_path).measured, filed(row, tmp_path).measured
    assert first == second
    other = filed(replace(row, measured=Measured(bank_of(99))), tmp_path).measured
    assert isinstance(first, BankFile)
    assert isinstance(other, BankFile)
    assert other.name != first.name
    assert first.read().bank.tasks == bank_of(1, joint=True).tasks


def test_former_banks_are_read_once_and_forgotten_ones_never(tmp_path: Path) -> None:
    """What a boundary reads does not grow with the number of stages."""
    read: list[int] = []

    class Counted(StageRow):
        def read_measured(self) -> Measured | None:
            read.append(self.stage)
            return super().read_measured()

    ledger = [
        Counted(
            stage=stage,
            start_iteration=stage,
            start_sample=stage,
            weights=Mixture.uniform(DOMAINS),
            measured=Measured(bank_of(stage, joint=True)),
        )
        for stage in range(100)
    ]
    history = History(TASKS)
    assert len(history.before(ledger[:99], 0.5, joint=True)) == 60
    assert read == list(range(98, 38, -1))
    read.clear()
    assert len(history.before(ledger, 0.5, joint=True)) == 60
    assert read == [99]
    assert history.before(ledger, 0.0, joint=True) == []


@pytest.mark.parametrize("weights", [{"t": 1.0}, {"t": 1.0, "u": 1.0, "typo": 2.0}])
def test_a_goal_with_other_tasks_is_refused(weights: dict[str, float]) -> None:
    ledger, _ = run(None, stages=1)
    rules = ledger[1].rules
    assert rules is not None
    with pytest.raises(InputError, match="they must name the deciding tasks, t, u; different: "):
        decide_again(ledger, 1, goal=replace(rules.goal, task_weights=weights))
