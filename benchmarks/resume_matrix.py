"""Save at each of four layouts, go on at each of them: the same samples, and losses within 1e-5.

``python benchmarks/resume_matrix.py --check``

Layouts are tensor × pipeline × data parallel. A run is saved after 4 iterations and trained for 3
more, from the same checkpoint at every layout; the losses of those are held against the run that
goes on at the layout that saved.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from forked_ranks import fork_rank, free_port

import megatron_tikmix.training.build as entry
from megatron_tikmix.config import load_config
from megatron_tikmix.data.dataset import BlendedDataset
from megatron_tikmix.jsonl import append_jsonl, read_jsonl
from tests.conftest import build_corpus, overridden

LAYOUTS = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1))
SAVED, END, BATCH = 4, 7, 8
SETTINGS: dict[str, Any] = {
    "timeout_minutes": 5,
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "make_vocab_size_divisible_by": 64,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "data": {"sequence_length": 32, "initial_mixture": "uniform"},
    "tasks": {"low": {"domain": "low"}},
    "train": {"train_iters": END, "micro_batch_size": 2, "global_batch_size": BATCH},
    "optimizer": {"lr": 2e-3, "adam_beta2": 0.2, "weight_decay": 0.01},
    "remix": {"policy": "static"},
    "evaluate": {"task_samples": 12},
}


def run_at(layout: Sequence[int], run_dir: Path, manifest: Path, **changes: Any) -> Path:
    """A run at this layout, to its end; returns where the indices that its ranks read are."""
    tensor, pipeline, data = layout
    settings = overridden(
        SETTINGS,
        {
            "run_dir": str(run_dir),
            "data.manifest": str(manifest),
            "model.tensor_model_parallel_size": tensor,
            "model.pipeline_model_parallel_size": pipeline,
            "train.log_interval": 1,
            **changes,
        },
    )
    records = run_dir.with_name(f"{run_dir.name}_records")
    shutil.rmtree(records, ignore_errors=True)
    records.mkdir()
    config = records / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    ranks = tensor * pipeline * data
    port = free_port()
    processes = [
        fork_rank(rank, ranks, port, records / "log", partial(_train, rank, config, records))
        for rank in range(ranks)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    if any(codes):
        raise RuntimeError(f"{layout}: {codes}\n{(records / 'log').read_text()}")
    return records


def _train(rank: int, config: Path, records: Path) -> None:
    """In a rank's process: train, and write down which samples are read."""
    read = BlendedDataset.__getitems__

    def recorded(self: BlendedDataset, indices: Sequence[int]) -> Any:
        for index in indices:
            append_jsonl(records / f"{rank}.jsonl", {"index": index})
        return read(self, indices)

    BlendedDataset.__getitems__ = recorded  # type: ignore[method-assign]
    entry.pretrain(*load_config([str(config)]))


def went_on(layout: Sequence[int], run_dir: Path, records: Path) -> dict[str, Any]:
    """Losses and counts of the iterations after the save, and the sample ids that were read."""
    rows = [row for row in read_jsonl(run_dir / "metrics.jsonl") if row["iteration"] > SAVED]
    every_rank = [
        [row["index"] for row in read_jsonl(path)] for path in sorted(records.glob("*.jsonl"))
    ]
    # Ranks of one model replica read the same samples; each replica's first rank counts.
    by_replica = {tuple(ids) for ids in every_rank}
    assert len(by_replica) == layout[2]
    return {
        "losses": [row["lm_loss"] for row in rows],
        "domain_samples": [row["domain_samples"] for row in rows],
        "samples": sorted(index for ids in by_replica for index in ids),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--check", action="store_true", help="exit with 1 if anything differs")
    arguments = parser.parse_args()
    cells: list[dict[str, Any]] = []
    print("largest relative difference of a loss\n")
    print("| saved at \\ loaded at | " + " | ".join(map(_name, LAYOUTS)) + " |")
    print("|---" * (len(LAYOUTS) + 1) + "|")
    with tempfile.TemporaryDirectory(prefix="resume_matrix_") as place:
        folder = Path(place)
        manifest = build_corpus(folder)
        for saver in LAYOUTS:
            saved = folder / f"saved_{_name(saver)}"
            run_at(saver, saved, manifest, **{"train.exit_interval": SAVED})
            found = {}
            for loader in LAYOUTS:
                run_dir = folder / f"{saved.name}_loaded_{_name(loader)}"
                shutil.copytree(saved, run_dir)
                found[loader] = went_on(loader, run_dir, run_at(loader, run_dir, manifest))
            row = [_cell(saver, loader, found[saver], found[loader]) for loader in LAYOUTS]
            cells += row
            figures = " | ".join(f"{cell['difference']:.1e}" for cell in row)
            print(f"| {_name(saver)} | {figures} |", flush=True)
    wrong = [cell for cell in cells if cell["difference"] > 1e-5 or not cell["same_samples"]]
    print(f"\nother samples, or losses further apart than 1e-5: {len(wrong)} of {len(cells)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")
    return 1 if arguments.check and wrong else 0


def _cell(
    saver: Sequence[int], loader: Sequence[int], at_saver: dict[str, Any], found: dict[str, Any]
) -> dict[str, Any]:
    pairs = list(zip(at_saver["losses"], found["losses"], strict=True))
    assert len(pairs) == END - SAVED
    return {
        "saved": _name(saver),
        "loaded": _name(loader),
        "difference": max(abs(a - b) / a for a, b in pairs),
        "same_samples": found["samples"] == list(range(SAVED * BATCH, END * BATCH))
        and found["domain_samples"] == at_saver["domain_samples"],
    }


def _name(layout: Sequence[int]) -> str:
    return "x".join(map(str, layout))


if __name__ == "__main__":
    sys.exit(main())
