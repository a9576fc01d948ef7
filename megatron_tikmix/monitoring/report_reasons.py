"""The part of the report that says what pushed the domains that moved most at each boundary."""

from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring.decision import moves
from megatron_tikmix.monitoring.explanation import Explanation, explain
from megatron_tikmix.monitoring.formatting import DASH, clean, number, percent, signed
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.page import details, table, text
from megatron_tikmix.monitoring.run_files import Row

MOST_MOVES = 8

HINT = (
    "The slope of each part of the objective at the solver's answer, relative to the mean over the "
    "mixture: + pushes the weight up. At an optimum they add up to 0 with what the active "
    "constraints push. Gain is summed over tasks; the task that counts most is in brackets."
)


def reasons(history: RunHistory) -> str:
    """A folded table for each boundary that solved something; empty without any."""
    parts = []
    for former, row in zip(history.stages, history.stages[1:], strict=False):
        found = _explained(history, former, row)
        if found:
            stage, iteration = row["stage"], f"{row['start_iteration']:,}"
            title = f"Stage {stage}, iteration {iteration}: what pushed the domains"
            parts.append(details(title, text("p", HINT, "hint") + _table(stage, found)))
    return "".join(parts)


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
    heads = ["before", "answer", "in force", "gain", "uniformity", "diversity", "constraints"]
    columns = {"domain": ""} | dict.fromkeys([*heads, "noise (±)"], "right")
    rows = [
        [
            clean(each.domain),
            percent(each.before),
            percent(each.solved),
            percent(each.after),
            _gain(each),
            signed(each.uniformity, 3),
            signed(each.diversity, 3),
            signed(each.constraints, 3),
            number(each.noise, 3),
        ]
        for each in found
    ]
    return table(f"reasons-{stage}", columns, rows)


def _gain(found: Explanation) -> str:
    """The sum over tasks, and the task that it comes from most."""
    pushes = {task: push for task, push in found.gain.items() if push is not None}
    if not pushes:
        return DASH
    most = max(pushes, key=lambda task: abs(pushes[task]))
    return f"{signed(sum(pushes.values()), 3)} ({clean(most)} {signed(pushes[most], 3)})"
