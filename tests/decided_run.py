"""A ledger whose stages were really decided, on banks made by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tikmix.config import ConstraintsConfig, RemixConfig
from megatron_tikmix.decision.decide import Boundary, Decider, Decision
from megatron_tikmix.decision.ledger import Ledger, StageRow
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import OWN_ROW
from megatron_tikmix.mixture.mixture import Mixture

DOMAINS, TASKS = ["b", "a", "junk"], ["t", "u"]
TRUTH_VD = np.array([[1.0, 0.6, 0.0], [0.5, 1.0, 0.0]])


def bank_of(seed: int, joint: bool = False) -> SubBatchBank:
    """What a probe measured, with the domains' own rows for joint influence if asked for."""
    rng = np.random.default_rng(seed)
    own_DD = np.array([[2.0, 0.4, 0.0], [0.4, 2.0, 0.0], [0.0, 0.0, 2.0]])
    values_VD = np.vstack([TRUTH_VD, own_DD]) if joint else TRUTH_VD
    tasks = [*TASKS, *(OWN_ROW + name for name in DOMAINS)] if joint else TASKS
    values_DBV = values_VD.T[:, None, :] + 0.05 * rng.normal(size=(3, 8, len(tasks)))
    return SubBatchBank(values_DBV * 64.0, np.full((3, 8), 64.0), DOMAINS, tasks)


def run(
    run_dir: Path | None,
    stages: int = 2,
    measure: Callable[[np.ndarray], np.ndarray] | None = None,
    constraints: ConstraintsConfig | None = None,
    joint: bool = True,
    **remix: Any,
) -> tuple[Ledger, list[Decision]]:
    """A ledger of so many boundaries, and the decisions that were made at them."""
    config = RemixConfig(constraints=constraints or ConstraintsConfig(), **remix)
    decider = Decider(
        config,
        seed=7,
        task_weights={"t": 2.0, "u": 1.0},
        samples_per_epoch={"b": 300, "a": 100, "junk": 900},
    )
    ledger = Ledger(run_dir=run_dir)
    prior = Mixture.uniform(DOMAINS).rounded()
    ledger.append(
        StageRow(stage=0, start_iteration=0, start_sample=0, source="initial", weights=prior)
    )
    made = []
    for stage in range(1, stages + 1):
        at = Boundary(
            stage=stage,
            iteration=10 * stage,
            prior=prior,
            consumed=dict.fromkeys(DOMAINS, 10 * stage),
            interval_samples=80,
            ledger=ledger[:],
        )
        decision = decider.decide(bank_of(stage, joint), at, measure)
        row = StageRow(
            stage=stage,
            start_iteration=10 * stage,
            start_sample=80 * stage,
            weights=decision.mixture.to_json(),
            total_variation=decision.mixture.total_variation(prior),
            **decision.fields_of_row(),
        )
        ledger.append(row)
        made.append(decision)
        prior = decision.mixture
    return ledger, made
