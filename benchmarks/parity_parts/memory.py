"""Bytes that a probe keeps on each rank while it is open, against what the plan says.

Counted are the tensors that came to life when the probe was opened, and live: the storages that
operators made, whatever they hold.
"""

import json
import sys
from pathlib import Path
from typing import Any

import megatron_tikmix  # noqa: F401  (first: it lets megatron-core do without CUDA)

# isort: split
import torch
from influence_parts.trained import write_json
from rich.table import Table

from megatron_tikmix.config import load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.training.build import build
from megatron_tikmix.training.record import Recorder
from parity_parts.start import Figures, Settings, new_run, on_ranks
from tests.live_bytes import LiveBytes

TP, PP, SP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2-sp-dp2": (4, {f"model.{TP}": 2, f"model.{SP}": True}),
    "pp2-dp2": (4, {f"model.{PP}": 2}),
}
MODES = ("sharded", "replicated")
TARGET = 0.05


def measure(settings: Settings, names: list[str], fresh: bool) -> Figures:
    figures: Figures = {}
    for layout, (ranks, fields) in LAYOUTS.items():
        for mode in MODES:
            name = f"memory-{layout}-{mode}"
            path = settings.work / "figures" / f"{name}.json"
            if fresh or not path.is_file():
                settings.say(f"{name}: {ranks} ranks …")
                fields = {**fields, "probe.data_parallel_mode": mode, "probe.task_samples": 8}
                config = new_run(settings, name, fields)
                log = settings.run_dir(name) / "log.txt"
                on_ranks(ranks, ["-m", "parity_parts.memory", str(config), str(path)], log)
            figures[f"{layout}, {mode}"] = json.loads(path.read_text(encoding="utf-8"))
    return figures


def main(config_file: str, out: str) -> None:
    """On each of the ranks that were launched."""
    torch.set_num_threads(1)
    config, resolved = load_config([config_file])
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        run = build(config, TrainingData(config), Recorder(config, resolved, parallel), parallel)
        assert run.remixer is not None
        assert run.probe_plan is not None
        probe = run.remixer.probe
        with probe.open(1):
            pass  # what is made once (indices of an epoch) is made
        with LiveBytes() as live, probe.open(1):
            kept = live.now()
        every: list[int | None] = [None] * parallel.world_size
        torch.distributed.all_gather_object(every, kept)
        if parallel.is_main:
            figures = {"planned": run.probe_plan.gradient_bytes, "kept": every}
            write_json(Path(out), figures)
    finally:
        shut_down()


def tables(figures: Figures) -> list[Table]:
    table = Table("layout, mode", "planned, bytes", "kept on each rank, bytes", "fullest / planned")
    table.title = "Validation gradients that an open probe keeps"
    for name, row in figures.items():
        each = " ".join(f"{kept:,}" for kept in row["kept"])
        table.add_row(name, f"{row['planned']:,}", each, f"{_ratio(row):.3f}")
    return [table]


def _ratio(row: dict[str, Any]) -> float:
    return float(max(row["kept"]) / row["planned"])


def missed(figures: Figures) -> list[str]:
    return [
        f"{name}: the fullest rank keeps {_ratio(row):.3f} of what is planned; the target is "
        f"1 ± {TARGET}"
        for name, row in figures.items()
        if not abs(_ratio(row) - 1) <= TARGET
    ]


if __name__ == "__main__":
    main(*sys.argv[1:])
