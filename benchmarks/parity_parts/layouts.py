"""The layouts: every one trains and probes from one checkpoint, and is held against one rank.

A layout is launched twice. `own` takes its own decisions at two boundaries: what it measured and
decided is compared. `ledger` follows those of the reference, and writes down every sample: losses
and samples are compared there, since a mixture that differs by rounding may swap two samples.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from influence_parts.trained import write_json
from numpy.typing import NDArray
from rich.table import Table

from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank
from parity_parts.start import BOUNDARIES, START, Figures, Settings, launch

TP, PP = "model.tensor_model_parallel_size", "model.pipeline_model_parallel_size"
VPP, SP = "model.virtual_pipeline_model_parallel_size", "model.sequence_parallel"
MICRO, MODE = "train.micro_batch_size", "probe.data_parallel_mode"
OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
RECOMPUTE = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}

REFERENCE: tuple[int, dict[str, Any]] = (1, {})
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "1-mb8": (1, {MICRO: 8}),
    "1-mb1": (1, {MICRO: 1}),
    "1-recompute": (1, RECOMPUTE),
    "dp2": (2, {}),
    "dp2-replicated": (2, {MODE: "replicated"}),
    "dp2-overlap-mb4": (2, {**OVERLAP, MICRO: 4, "ddp.bucket_size": 20_000}),
    "tp2": (2, {TP: 2}),
    "tp2-sp": (2, {TP: 2, SP: True}),
    "pp2": (2, {PP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "dp4": (4, {}),
    "dp4-replicated": (4, {MODE: "replicated", MICRO: 1}),
    "tp4": (4, {TP: 4}),
    "tp4-sp": (4, {TP: 4, SP: True}),
    "pp4": (4, {PP: 4}),
    "tp2-pp2": (4, {TP: 2, PP: 2}),
    "pp2-vpp2-dp2-overlap": (4, {PP: 2, VPP: 2, **OVERLAP}),
    "tp2-pp2-dp2": (8, {TP: 2, PP: 2}),
    "tp2-pp2-dp2-sp": (8, {TP: 2, PP: 2, SP: True}),
    "tp2-sp-pp2-vpp2-dp2": (
        8,
        {TP: 2, PP: 2, VPP: 2, SP: True, **OVERLAP, **RECOMPUTE, MODE: "replicated"},
    ),
}
"""Ranks, and what is configured, by name."""

TARGETS = {"loss": 1e-5, "influence": 1e-4, "mixture": 1e-3}
NAMES = {
    "loss": "loss, relative",
    "influence": "influence, of the row's largest",
    "mixture": "mixture",
}


def measure(settings: Settings, names: list[str], fresh: bool) -> Figures:
    """The figures of these layouts, each kept once it is there."""
    reference = _of_layout(settings, "reference", *REFERENCE)
    figures = {}
    for name in names:
        path = settings.work / "figures" / f"{name}.json"
        if fresh or not path.is_file():
            ranks, fields = LAYOUTS[name]
            settings.say(f"{name}: {ranks} ranks …")
            found = _of_layout(settings, name, ranks, fields, fresh)
            write_json(path, {"ranks": ranks, **compared(found, reference)})
        figures[name] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def _of_layout(
    settings: Settings, name: str, ranks: int, fields: dict[str, Any], fresh: bool = False
) -> dict[str, Any]:
    """What both launches wrote."""
    own, ledger = f"{name}-own", f"{name}-ledger"
    seconds = [launch(settings, own, ranks, fields, fresh=fresh)]
    follow = {"remix.policy": "schedule", "remix.schedule": str(settings.run_dir("reference-own"))}
    seconds.append(launch(settings, ledger, ranks, {**fields, **follow}, record=True, fresh=fresh))
    return {
        "seconds": seconds,
        "own": rows(settings.run_dir(own), "metrics.jsonl"),
        "ledger": rows(settings.run_dir(ledger), "metrics.jsonl"),
        "stages": stages(settings.run_dir(own)),
        "samples": samples(settings.run_dir(ledger) / "samples"),
    }


def compared(found: dict[str, Any], reference: dict[str, Any]) -> Figures:
    """How far one layout is from the reference, in the measures of `TARGETS`."""
    influence = [
        _influence_error(ours, theirs)
        for ours, theirs in zip(banks(found), banks(reference), strict=True)
    ]
    if len(influence) != len(BOUNDARIES):
        raise InputError(f"{len(influence)} boundaries were probed, not {len(BOUNDARIES)}")
    weights, expected = ([s["weights"] for s in run["stages"]] for run in (found, reference))
    return {
        "loss": _loss_error(found["ledger"], reference["ledger"]),
        "loss_own": _loss_error(found["own"], reference["own"]),
        "grad_norm": _loss_error(found["ledger"], reference["ledger"], "grad_norm"),
        "influence": float(np.max(influence)),
        "influence_at": influence,
        "mixture": max(
            abs(a[domain] - b[domain])
            for a, b in zip(weights, expected, strict=True)
            for domain in b
        ),
        "moved": max(abs(expected[-1][d] - expected[0][d]) for d in expected[0]),
        "samples_equal": found["samples"] == reference["samples"],
        "samples": len(found["samples"]),
        "seconds": found["seconds"],
    }


def _loss_error(ours: list[dict], theirs: list[dict], field: str = "lm_loss") -> float:
    pairs = list(zip(_after_start(ours), _after_start(theirs), strict=True))
    if any(a["iteration"] != b["iteration"] for a, b in pairs):
        raise InputError("the rows of metrics.jsonl are not those of the same iterations")
    # numpy's, for which a NaN is the largest.
    return float(np.max([abs(a[field] - b[field]) / abs(b[field]) for a, b in pairs]))


def _after_start(rows_of_run: list[dict]) -> list[dict]:
    return [row for row in rows_of_run if row["iteration"] > START]


def banks(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [stage["bank"] for stage in found["stages"] if stage["bank"]]


def _influence_error(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    a_VD, b_VD = (
        SubBatchBank.from_json(bank).influence_matrix().values_VD for bank in (ours, theirs)
    )
    error_VD: NDArray[np.float64] = np.abs(a_VD - b_VD) / np.abs(b_VD).max(axis=1, keepdims=True)
    return float(error_VD.max())


def rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = (run_dir / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def stages(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's ledger, each with its bank in it."""
    found = []
    for row in Ledger.read(run_dir):
        measured = row.read_measured()
        found.append(row.to_json() | {"bank": measured and measured.to_json()})
    return found


def samples(folder: Path) -> dict[int, tuple[int, str]]:
    """Domain and hash of the tokens of every sample that any rank read, by its global index."""
    read: dict[int, tuple[int, str]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            index, domain, tokens = json.loads(line)
            if read.setdefault(index, (domain, tokens)) != (domain, tokens):
                raise InputError(f"two ranks read different samples at index {index}")
    return read


def tables(figures: Figures) -> list[Table]:
    table = Table("layout", "ranks", *NAMES.values(), "samples", "loss, own", "seconds")
    table.title = "Largest difference from one rank, 20 iterations and two boundaries"
    for name, row in figures.items():
        equal = f"{row['samples']} equal" if row["samples_equal"] else "differ"
        errors = [f"{row[key]:.1e}" for key in TARGETS]
        seconds = f"{sum(row['seconds']):.0f}"
        table.add_row(name, str(row["ranks"]), *errors, equal, f"{row['loss_own']:.1e}", seconds)
    return [table]


def missed(figures: Figures) -> list[str]:
    texts = [
        f"{name}: {NAMES[key]} differs by {row[key]:.1e}; the target is {target:.0e}"
        for name, row in figures.items()
        for key, target in TARGETS.items()
        if not row[key] <= target
    ]
    unequal = [name for name, row in figures.items() if not row["samples_equal"]]
    return texts + [f"{name}: its samples are not the reference's" for name in unequal]
