"""How near a probe's decision is to the large-sample one, against the tokens it took.

A probe is a draw of sub-batches from a large bank. The adaptive one is run by AdaptiveBudget, as
at a boundary with `probe.precision`; beside it, on the same sub-batches in the same order, stands
a fixed probe of equal tokens, the same for every domain.
"""

import numpy as np
from rich.table import Table

from influence_parts.additivity import shuffled
from influence_parts.decision import SUB_BATCH_SAMPLES, Decision, reference_bank
from influence_parts.statistics import mean_and_interval
from influence_parts.trained import Figures, Settings, chosen, trained
from megatron_tikmix.influence.bank import MIN_SUB_BATCHES, SubBatchBank
from megatron_tikmix.influence.budget import AdaptiveBudget, apportion
from megatron_tikmix.mixture.mixture import Mixture

PRECISIONS = (0.05, 0.025, 0.0125)
RUNS = 24
FIXED = (8, 16, 32, 64, 128, 256)
"""Sub-batches of each domain."""
LARGEST_SHARE = 0.25
"""A probe may take so much of the bank, or the large-sample decision would be its own."""


def measure(settings: Settings) -> Figures:
    with trained(settings) as found:
        bank = reference_bank(settings, found)
        bits = SUB_BATCH_SAMPLES * found.config.data.sequence_length
    solve = Decision(Mixture.uniform(bank.domains))
    reference = solve(bank.influence_matrix())
    fixed = []
    for size in FIXED:
        distances = []
        for run in range(RUNS):
            order_DB = shuffled(bank, np.random.default_rng([size, run]))
            mixture = solve(chosen(bank, order_DB[:, :size]).influence_matrix())
            distances.append(mixture.total_variation(reference))
        tokens = size * len(bank.domains) * bits
        fixed.append({"tokens": tokens, "total_variation": mean_and_interval(distances)})
    adaptive = []
    for precision in PRECISIONS:
        settings.say(f"precision {precision} …")
        rows = [paired(bank, solve, reference, precision, run) for run in range(RUNS)]
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        difference = np.array(columns["adaptive"]) - np.array(columns["fixed"])
        adaptive.append(
            {
                "precision": precision,
                "tokens": float(np.mean(columns["sub_batches"])) * bits,
                "adaptive": mean_and_interval(columns["adaptive"]),
                "fixed": mean_and_interval(columns["fixed"]),
                "difference": mean_and_interval(difference),
                "confirmed": float(np.mean(columns["confirmed"])),
                "within_precision_if_confirmed": within(columns, precision),
            }
        )
    return {"reference": dict(reference), "fixed": fixed, "adaptive": adaptive, "runs": RUNS}


def within(columns: dict[str, list[float]], precision: float) -> float | None:
    """Of the confirmed answers, the share that is within the precision of the reference."""
    near = [
        distance <= precision
        for distance, confirmed in zip(columns["adaptive"], columns["confirmed"], strict=True)
        if confirmed
    ]
    return float(np.mean(near)) if near else None


def paired(
    bank: SubBatchBank, solve: Decision, reference: Mixture, precision: float, run: int
) -> dict[str, float]:
    """One adaptive probe, and the fixed one of equal tokens on the same sub-batches."""
    order_DB = shuffled(bank, np.random.default_rng([99, run]))
    D, B = order_DB.shape
    numbers_B = np.arange(B)

    def first(counts_D: np.ndarray) -> SubBatchBank:
        kept_DB = np.where(numbers_B < counts_D[:, None], order_DB, -1)
        return chosen(bank, kept_DB[:, : int(counts_D.max())])

    limit_D = int(LARGEST_SHARE * B)
    weights = dict.fromkeys(bank.tasks, 1.0)
    budget = AdaptiveBudget(precision, solve, weights, np.random.default_rng([7, run]))
    counts_D = np.full(D, MIN_SUB_BATCHES)
    while True:
        more_D = budget.more(first(counts_D), int(D * limit_D - counts_D.sum()))
        more_D = np.minimum(more_D, B - counts_D)
        if not more_D.any():
            break
        counts_D = counts_D + more_D
    equal_D = apportion(int(counts_D.sum()), np.ones(D))
    distances = [
        solve(first(counts).influence_matrix()).total_variation(reference)
        for counts in (counts_D, equal_D)
    ]
    return {
        "sub_batches": float(counts_D.sum()),
        "adaptive": distances[0],
        "fixed": distances[1],
        "confirmed": float(budget.confirmed),
    }


def tables(figures: Figures) -> list[Table]:
    fixed = Table("probe tokens", "total variation", title="To the large-sample decision: fixed")
    for row in figures["fixed"]:
        fixed.add_row(f"{row['tokens']:,}", spread(row["total_variation"]))
    table = Table("precision", "tokens", "adaptive", "fixed", "adaptive − fixed", "confirmed")
    table.add_column("within precision if confirmed")
    table.title = f"Adaptive against fixed at equal tokens, {figures['runs']} pairs"
    for row in figures["adaptive"]:
        near = row["within_precision_if_confirmed"]
        table.add_row(
            f"{row['precision']}",
            f"{row['tokens']:,.0f}",
            *(spread(row[key]) for key in ("adaptive", "fixed", "difference")),
            f"{row['confirmed']:.0%}",
            "—" if near is None else f"{near:.0%}",
        )
    return [fixed, table]


def spread(value: dict[str, float]) -> str:
    return f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def missed(figures: Figures) -> list[str]:
    """An adaptive budget must not be worse than a fixed one, outside the interval of the pairs."""
    return [
        f"at precision {row['precision']} the adaptive budget is worse than a fixed one by "
        f"{spread(row['difference'])}"
        for row in figures["adaptive"]
        if row["difference"]["low"] > 0
    ]
