"""Do the 95% intervals hold the large-sample value 95% of the time?

Over 200 probes with no sub-batch in common, drawn from a bank 200 times as large, and over some
that are measured anew with streams of their own. The validation set is the same throughout:
intervals are conditional on it.
"""

import numpy as np
from rich.table import Table
from scipy.stats import t as students_t

from influence_parts.additivity import shuffled
from influence_parts.decision import SUB_BATCH_SAMPLES, reference_bank
from influence_parts.statistics import Array
from influence_parts.trained import Figures, Settings, Trained, chosen, large_bank, trained
from megatron_tikmix.influence.bank import SubBatchBank

SUB_BATCHES = (8, 16, 32)
PROBES = 200
SEPARATE_PROBES = 16
TARGET = (0.92, 0.98)


def measure(settings: Settings) -> Figures:
    with trained(settings) as found:
        bank = reference_bank(settings, found)
        separate = separate_probes(settings, found)
    truth_VD = bank.influence_matrix().values_VD
    generator = np.random.default_rng(0)
    rows = []
    for size in SUB_BATCHES:
        order_DB = shuffled(bank, generator)
        count = min(PROBES, order_DB.shape[1] // size)
        parts = np.split(order_DB[:, : count * size], count, axis=1)
        inside = np.array([holds(chosen(bank, picks), truth_VD) for picks in parts])
        rows.append(row_of(f"{size} sub-batches", inside, bank))
    inside = np.array([holds(probe, truth_VD) for probe in separate])
    rows.append(row_of("8, measured anew", inside, bank))
    return {"rows": rows, "tokens_of_bank": float(bank.tokens_DB.sum())}


def separate_probes(settings: Settings, found: Trained) -> list[SubBatchBank]:
    return [
        large_bank(
            settings,
            found,
            sub_batches=SUB_BATCHES[0],
            sub_batch_samples=SUB_BATCH_SAMPLES,
            seed=1000 + number,
            curvature="adam",
        )
        for number in range(SEPARATE_PROBES)
    ]


def holds(bank: SubBatchBank, truth_VD: Array) -> np.ndarray:
    """Whether each entry's 95% t interval holds the truth, bool (V, D)."""
    matrix = bank.influence_matrix()
    assert matrix.standard_error_VD is not None
    quantile_D = students_t.ppf(0.975, bank.degrees_of_freedom_D)
    inside: np.ndarray = (
        np.abs(matrix.values_VD - truth_VD) <= quantile_D * matrix.standard_error_VD
    )
    return inside


def row_of(label: str, inside_RVD: np.ndarray, bank: SubBatchBank) -> Figures:
    by_domain_D = inside_RVD.mean(axis=(0, 1))
    return {
        "probe": label,
        "probes": len(inside_RVD),
        "coverage": float(inside_RVD.mean()),
        "by_task": dict(zip(bank.tasks, inside_RVD.mean(axis=(0, 2)).tolist(), strict=True)),
        "by_domain": dict(zip(bank.domains, by_domain_D.tolist(), strict=True)),
        "lowest_entry": float(inside_RVD.mean(axis=0).min()),
    }


def tables(figures: Figures) -> list[Table]:
    table = Table("probe", "probes", "coverage", "by task", "by domain", "lowest entry")
    table.title = "95% intervals that hold the large-sample value"
    for row in figures["rows"]:
        spans = [
            f"{min(r.values()):.1%} to {max(r.values()):.1%}"
            for r in (row["by_task"], row["by_domain"])
        ]
        table.add_row(
            row["probe"],
            str(row["probes"]),
            f"{row['coverage']:.1%}",
            *spans,
            f"{row['lowest_entry']:.1%}",
        )
    return [table]


def missed(figures: Figures) -> list[str]:
    low, high = TARGET
    return [
        f"coverage over {row['probes']} probes of {row['probe']} is {row['coverage']:.1%}; the "
        f"target is {low:.0%} to {high:.0%}"
        for row in figures["rows"]
        if row["probes"] >= PROBES and not low <= row["coverage"] <= high
    ]
