"""The parts of the report that keep the record: what the run cost, and what it was run with."""

from typing import Any

import yaml

from megatron_tikmix.monitoring.cost import Spent
from megatron_tikmix.monitoring.formatting import DASH, clean, count, duration, percent
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.page import details, section, table, text

SETTINGS = {
    "layers × hidden size": ("model.num_layers", "model.hidden_size"),
    "parameters in": ("model.params_dtype",),
    "sequence length": ("data.sequence_length",),
    "batch, samples": ("train.global_batch_size",),
    "learning rate, largest and least": ("optimizer.lr", "optimizer.min_lr"),
    "seed": ("seed",),
    "policy": ("remix.policy", "remix.mode"),
    "interval, samples": ("remix.interval_samples",),
    "α, β, γ": ("remix.alpha", "remix.beta", "remix.gamma"),
    "gain, and what diversity is measured from": ("remix.gain", "remix.diversity_reference"),
    "influence, smoothing": ("remix.influence", "remix.smoothing"),
    "probe: curvature, sub-batches × samples": (
        "probe.curvature",
        "probe.sub_batches",
        "probe.sub_batch_samples",
    ),
}

NO_BOUND = {"lower": 0.0, "upper": 1.0, "pareto_slack": 0.0}


def cost(history: RunHistory) -> str:
    """Training beside all that was spent on deciding."""
    hint = (
        "Compute counts forward and backward passes; a token that only goes forward counts a "
        "third. Evaluations on held-out items and checkpoints are not counted."
    )
    trained = int(history.samples * (history.sequence_length or 0))
    training = Spent("training", trained, 0, history.training_seconds or None)
    parts = [training, *history.spent]
    columns = {"": ""} | dict.fromkeys(
        ["tokens", "compute, of training's", "time", "time, of training's"], "right"
    )
    rows = [
        [
            part.kind,
            count(part.trained_tokens + part.evaluated_tokens) if trained else DASH,
            percent(part.compute / training.compute if trained else None),
            duration(part.seconds),
            percent(part.seconds / training.seconds if part.seconds and training.seconds else None),
        ]
        for part in parts
    ]
    return section("Cost", hint, table("cost", columns, rows))


def configuration(history: RunHistory) -> str:
    """The settings that runs are most often compared by, all others, versions and restarts."""
    hint = "Versions, layout and device of each start of the run; its settings as resolved."
    content = _starts(history)
    rows = [[name, _values(history, paths)] for name, paths in SETTINGS.items()]
    rows += [["constraints", _constraints(history.setting("remix", "constraints"))]]
    content += table("settings", {"setting": "brief", "": ""}, [row for row in rows if row[1]])
    if history.config:
        dump = yaml.safe_dump(history.config, sort_keys=False, allow_unicode=True)
        content += details("config.yaml, every field", text("pre", dump))
    return section("Configuration and versions", hint, content)


def _starts(history: RunHistory) -> str:
    columns = {"started": "brief", "iteration": "right", "ranks": "", "device": "", "versions": ""}
    rows = []
    for start in history.starts:
        layout = " × ".join(f"{name} {size}" for name, size in (start.get("layout") or {}).items())
        versions = start.get("versions") or {}
        rows.append(
            [
                clean(start.get("time", DASH)).replace("T", " "),
                f"{start.get('iteration', 0):,}",
                f"{start.get('world_size', DASH)} = {layout}" if layout else DASH,
                clean(start.get("device", DASH)),
                ", ".join(clean(f"{name} {version}") for name, version in versions.items()),
            ]
        )
    return table("starts", columns, rows) if rows else ""


def _values(history: RunHistory, paths: tuple[str, ...]) -> str:
    found = [history.setting(*path.split(".")) for path in paths]
    return " / ".join(clean(value) for value in found if value is not None)


def _constraints(constraints: Any) -> str:
    """Those that do something."""
    if not isinstance(constraints, dict):
        return ""
    found = {
        name: value
        for name, value in constraints.items()
        if value not in (None, False, {}, [], NO_BOUND.get(name))
    }
    return "; ".join(clean(f"{name} {value}") for name, value in found.items())
