"""The part of the report that says what pushed the domains that moved most at each boundary."""

from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring.change import Change
from megatron_tikmix.monitoring.decision import moves
from megatron_tikmix.monitoring.explanation import Explanation, explain
from megatron_tikmix.monitoring.formatting import DASH, number, shorten, signed
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.page import details, table, text
from megatron_tikmix.monitoring.run_files import Row

MOST_MOVES, LONGEST_NAME = 8, 26

HINT = (
    "What made the solver's answer differ from the mixture before, in points of weight; the parts "
    "add up to the change. Gain is summed over tasks; what multiplies all weights alike, so that "
    "they sum to 1, is under all alike. Noise is one standard error of gain and uniformity, at "
    "most. inspect_run.py why has every task."
)


def reasons(history: RunHistory) -> str:
    """A folded table for each boundary that solved something; empty without any."""
    parts = []
    for former, row in zip(history.stages, history.stages[1:], strict=False):
        found = _explained(history, former, row)
        if found:
            stage, iteration = row["stage"], f"{row['start_iteration']:,}"
            title = f"Stage {stage}, iteration {iteration}: what moved the domains that moved most"
            parts.append(details(title, _table(stage, found)))
    return text("p", HINT, "hint") + "".join(parts) if parts else ""


def _explained(history: RunHistory, former: Row, row: Row) -> list[Explanation]:
    """Of the domains that the answer moves most; none where the objective cannot be restated."""
    answer = (row.get("solution") or {}).get("mixture")
    if not answer:
        return []
    largest = [move.domain for move in moves(former["weights"], answer) if move.change]
    try:
        return [explain(history, name, row["stage"]) for name in largest[:MOST_MOVES]]
    except InputError:
        return []


def _table(stage: int, found: list[Explanation]) -> str:
    columns = {"domain": "brief", "weight (%)": "right", "gain": "right", "most from": ""}
    parts = ["uniformity", "diversity", "constraints", "all alike", "change", "noise (±)"]
    columns |= dict.fromkeys(parts, "right")
    rows = [
        [
            shorten(each.domain, LONGEST_NAME),
            f"{100 * each.before:.1f} → {100 * each.solved:.1f}",
            *_parts(each.change, each.solved - each.before),
        ]
        for each in found
    ]
    return table(f"reasons-{stage}", columns, rows)


def _parts(change: Change | None, total: float) -> list[str]:
    """In points; of an answer that is no certified optimum, only the change is known."""
    if change is None:
        return [DASH] * 6 + [signed(100 * total), DASH]
    most = max(change.gain, key=lambda task: abs(change.gain[task]))
    parts = (change.uniformity, change.diversity, change.constraints, change.shared, change.total)
    return [
        signed(100 * sum(change.gain.values())),
        f"{shorten(most, LONGEST_NAME)} {signed(100 * change.gain[most])}",
        *(signed(100 * part) for part in parts),
        number(None if change.noise is None else 100 * change.noise, 2),
    ]
