"""The goals, and which of them the figures miss."""

from collections.abc import Iterator, Mapping
from typing import Any


def misses(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each goal that is missed; goals of parts that were not run are left out."""
    return [*_comparison(found), *_outcomes(found)]


def _comparison(found: Mapping[str, Any]) -> Iterator[str]:
    if "comparison" not in found:
        return
    rows = {row["policy"]: row for row in found["comparison"]}
    against = found["against_ours"]
    closed = rows["TiKMiX-D"]["gap_closed"]
    if closed.mean < 0.95:
        yield f"TiKMiX-D closes {closed.mean:.0%} of the gap, and 95% is the goal"
    for name in ("TiKMiX-D, paper", "uniform, no junk"):
        if not against[name].low > 0:
            yield f"TiKMiX-D is not better than {name} outside the interval: {against[name].text()}"
    budget = 5 * rows["TiKMiX-D"]["decision_flops"]
    within = [
        row
        for row in rows.values()
        if row["policy"].startswith("RegMix") and row["decision_flops"] <= 1.05 * budget
    ]
    for row in within:
        if against[row["policy"]].mean < 0:
            yield f"{row['policy']} is better, with up to five times the decision's compute"
    rollouts = against.get("TiKMiX-M, rollouts")
    if rollouts and rollouts.mean > 0:
        yield f"TiKMiX-M with rollouts is worse than TiKMiX-D: {rollouts.text(sign=True)}"


def _outcomes(found: Mapping[str, Any]) -> Iterator[str]:
    if "outcomes" in found:
        part = found["outcomes"]["all"]
        if part["r"] < 0.85 or part["low"] < 0.5:
            yield f"influence against the final loss: r {part['r']:.2f}, from {part['low']:.2f}"
