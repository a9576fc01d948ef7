"""The same bits: a run twice, with a probe that only advises, stopped and resumed."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_first_parts import runs, versions
from gpu_first_parts.notes import Notes

STATIC = {"remix.policy": "static"}
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "float32": ({}, False),
    "bf16": ({"model.bf16": True}, False),
    "bf16, deterministic": ({"model.bf16": True}, True),
}
"""Fields, and whether torch is told to use deterministic algorithms."""


def measure(notes: Notes, device: str, work: Path) -> None:
    versions.note_machine(notes, device)
    runs.tiny(work, "none")  # writes the corpus
    for kind in KINDS if device == "cuda" else ["float32"]:
        # Starting takes longest, and leaves the card alone.
        with ThreadPoolExecutor(4 if device == "cuda" else 2) as pool:
            _compare(notes, work, kind, pool)


def _compare(notes: Notes, work: Path, kind: str, pool: ThreadPoolExecutor) -> None:
    ways: dict[str, list[dict[str, Any]]] = {
        "again": [STATIC],
        "a probe that advises": [{"remix.mode": "advise"}],
        "resumed": [STATIC | {"train.exit_interval": 6}, STATIC],
    }
    left = [way for way in ways if f"{kind}: {way}" not in notes]
    if not left:
        return
    first = pool.submit(_rows, work, kind, "first", [STATIC])
    later = {way: pool.submit(_rows, work, kind, way, ways[way]) for way in left}
    expected = first.result()
    for way, running in later.items():
        rows = running.result()
        same = rows == expected
        figures = {"the same bits": same, "rows": len(rows)}
        if not same:
            pairs = list(zip(expected, rows, strict=True))
            figures["first iteration that differs"] = next(
                row["iteration"] for row, other in pairs if row != other
            )
            figures["largest relative difference of a loss"] = max(
                abs(row["lm_loss"] - other["lm_loss"]) / row["lm_loss"] for row, other in pairs
            )
        notes.add(f"{kind}: {way}", figures, kept=_kept(notes, kind, way, same))


def _kept(notes: Notes, kind: str, way: str, same: bool) -> bool | None:
    """None where training itself is not the same twice, and so says nothing of the rest."""
    again = f"{kind}: again"
    if way != "again" and again in notes and not notes.figures(again)["the same bits"]:
        return None
    return same


def _rows(work: Path, kind: str, way: str, launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """metrics.jsonl of a run, in as many launches."""
    fields, deterministic = KINDS[kind]
    name = f"bits, {kind}, {way}".replace(", ", "-").replace(" ", "_")
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    for changes in launches:
        settings = runs.tiny(work, name, fields | changes)
        runs.train(settings, deterministic=deterministic)
    rows = runs.rows_of(settings)
    if len(rows) != settings["train"]["train_iters"]:
        raise RuntimeError(f"{name}: {len(rows)} rows of metrics.jsonl")
    return rows
