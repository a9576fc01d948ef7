"""Influence in bf16 against fp32: both trained on from the same checkpoint, and probed."""

import json
from typing import Any

import numpy as np
from influence_parts.statistics import correlations
from influence_parts.trained import write_json
from rich.table import Table

from megatron_tikmix.influence.bank import SubBatchBank
from parity_parts.layouts import PP, REFERENCE, SP, TP, banks, stages
from parity_parts.start import BOUNDARIES, Figures, Settings, launch

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "bf16": (1, {}),
    "bf16-gradients-bf16": (1, {"probe.gradient_dtype": "bf16"}),
    "bf16-tp2-pp2-sp": (4, {TP: 2, PP: 2, SP: True}),
}
TARGET = 0.99


def measure(settings: Settings, names: list[str], fresh: bool) -> Figures:
    launch(settings, "reference-own", *REFERENCE)
    expected = matrices(settings, "reference-own")
    figures: Figures = {}
    for name, (ranks, fields) in LAYOUTS.items():
        path = settings.work / "figures" / f"{name}.json"
        if fresh or not path.is_file():
            settings.say(f"{name}: {ranks} ranks …")
            launch(settings, name, ranks, {**fields, "model.bf16": True}, fresh=fresh)
            found = matrices(settings, name)
            r_by_boundary = [
                {"all": float(correlations(a.reshape(-1, 1), b.reshape(-1, 1))[0])}
                | {"tasks": correlations(a.T, b.T).tolist()}
                for a, b in zip(found, expected, strict=True)
            ]
            write_json(path, {"ranks": ranks, "r": r_by_boundary})
        figures[name] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def matrices(settings: Settings, name: str) -> list[np.ndarray]:
    """S_VD of both boundaries."""
    ledger = {"stages": stages(settings.run_dir(name))}
    return [SubBatchBank.from_json(b).influence_matrix().values_VD for b in banks(ledger)]


def tables(figures: Figures) -> list[Table]:
    table = Table("run", "ranks", *(f"iteration {at}: r, of all / least row" for at in BOUNDARIES))
    table.title = "Influence in bf16, correlated with fp32"
    for name, row in figures.items():
        cells = [f"{r['all']:.5f} / {min(r['tasks']):.5f}" for r in row["r"]]
        table.add_row(name, str(row["ranks"]), *cells)
    return [table]


def missed(figures: Figures) -> list[str]:
    return [
        f"{name}: r is {min(r['tasks']):.4f} at iteration {at}; the target is {TARGET}"
        for name, row in figures.items()
        for r, at in zip(row["r"], BOUNDARIES, strict=True)
        if not min(r["tasks"]) >= TARGET
    ]
