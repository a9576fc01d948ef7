"""Runs for the pieces: small ones in float32, and GPTs of 350 M and 1 B parameters in bf16."""

import copy
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for module in ("megatron", "torch"):  # their notes on optional packages; before they are imported
    warnings.filterwarnings("ignore", module=rf"{module}\..*")

import megatron_tikmix  # noqa: E402, F401  (first: it lets megatron-core do without CUDA)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from parity_parts import corpus  # noqa: E402

from megatron_tikmix.config import load_config  # noqa: E402
from megatron_tikmix.data.builder import TrainingData  # noqa: E402
from megatron_tikmix.data.domains import DomainManifest, DomainSplit  # noqa: E402
from megatron_tikmix.jsonl import read_jsonl  # noqa: E402
from megatron_tikmix.megatron.groups import initialize, shut_down  # noqa: E402
from megatron_tikmix.training.build import build  # noqa: E402
from megatron_tikmix.training.loop import Run  # noqa: E402
from megatron_tikmix.training.record import Recorder  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

Fields = Mapping[str, Any]

TINY: dict[str, Any] = {
    "timeout_minutes": 2,
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "make_vocab_size_divisible_by": 64,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "transformer_impl": "local",
    },
    "data": {"sequence_length": 32, "initial_mixture": "uniform"},
    "tasks": {"up": {"domain": "ascending"}, "down": {"domain": "descending"}},
    "train": {"train_iters": 12, "micro_batch_size": 2, "global_batch_size": 8, "log_interval": 1},
    "optimizer": {"lr": 2e-3, "adam_beta2": 0.2, "weight_decay": 0.01},
    "remix": {"interval_samples": 32, "influence": "marginal"},
    "probe": {"sub_batch_samples": 4, "task_samples": 12, "max_overhead": None, "damping": 0.1},
    "evaluate": {"task_samples": 12},
}
"""A run of seconds, with boundaries at 4 and 8 and dropout on."""

GPT: dict[str, dict[str, Any]] = {
    "350m": {
        "model": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16},
        "length": 2048,
    },
    "1b": {
        "model": {
            "num_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_query_groups": 8,
        },
        "length": 4096,
    },
    "rehearsal": {
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
        "length": 64,
    },
}
MICRO_BATCH = 4
DOMAINS, TASKS = 6, 4


def tiny(work: Path, name: str, fields: Fields = {}) -> dict[str, Any]:  # noqa: B006
    """TINY with ``{"section.field": value}`` put in, and the corpus that it needs."""
    places = {
        "run_dir": str(work / "runs" / name),
        "data.manifest": str(corpus.build(work / "tiny")),
    }
    return changed(TINY, {**places, **fields})


def gpt(name: str, device: str, work: Path, fields: Fields = {}) -> dict[str, Any]:  # noqa: B006
    """A GPT as examples/1b.yaml has it, in bf16, that trains on made-up domains."""
    size = GPT[name if device == "cuda" else "rehearsal"]
    micro = MICRO_BATCH if device == "cuda" else 2
    model = {
        "ffn_hidden_size": 4 * size["model"]["hidden_size"],
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": "torch.nn.functional.silu",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        "transformer_impl": "local",
        "attention_backend": "local",
    }
    vocabulary, tokens = (32_000, 4_000_000) if device == "cuda" else (1_000, 100_000)
    manifest = made_up(work / f"made_up_{vocabulary}", vocabulary, tokens)
    settings = {
        "run_dir": str(work / "runs" / name),
        "model": size["model"] | model,
        "data": {
            "manifest": str(manifest),
            "sequence_length": size["length"],
            "initial_mixture": "uniform",
        },
        "tasks": {f"task{i}": {"domain": f"domain{i}"} for i in range(TASKS)},
        "train": {
            "train_iters": 400,
            "micro_batch_size": micro,
            "global_batch_size": 4 * micro,
            "log_interval": 400,
        },
        "optimizer": {"lr": 3e-4, "adam_beta2": 0.95, "clip_grad": 1.0},
        "remix": {"interval_samples": 400 * micro, "influence": "marginal"},
        "probe": {
            "sub_batches": 8,
            "sub_batch_samples": 2 * micro,
            "task_samples": 2 * micro,
            "max_overhead": None,
        },
        "evaluate": {"task_samples": 2 * micro},
    }
    return changed(settings, fields)


def changed(settings: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """A copy of `settings` with ``{"section.field": value}`` put in."""
    result = copy.deepcopy(settings)
    for field, value in fields.items():
        *sections, last = field.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return result


def made_up(folder: Path, vocabulary: int, tokens: int) -> Path:
    """Write domains that count in steps of their own, unless they are there; their manifest."""
    path = folder / "domains.yaml"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    domains: dict[str, dict[str, DomainSplit]] = {}
    for number in range(DOMAINS):
        domains[f"domain{number}"] = {}
        for split, total in (("train", tokens), ("validation", tokens // 4)):
            prefix, documents = folder / f"domain{number}_{split}", total // 1000
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            for _ in range(documents):
                steps = (number + 1) * np.arange(1000, dtype=np.int64)
                text = 1 + (steps + generator.integers(vocabulary)) % (vocabulary - 1)
                text[-1] = 0
                builder.add_item(torch.from_numpy(text))
                builder.end_document()
            builder.finalize(f"{prefix}.idx")
            domains[f"domain{number}"][split] = DomainSplit(prefix, documents, documents * 1000)
    DomainManifest(path, None, vocabulary, 0, domains).save()
    return path


@contextmanager
def built(settings: dict[str, Any]) -> Iterator[tuple[Run, TrainingData]]:
    """The run of these settings on one rank, in this process, and its data."""
    config, resolved = load_config([str(written(settings))])
    config.check(1)
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        data = TrainingData(config)
        yield build(config, data, Recorder(config, resolved, parallel), parallel), data
    finally:
        shut_down()


def written(settings: dict[str, Any]) -> Path:
    """The configuration file of these settings, beside the run's folder."""
    run_dir = Path(settings["run_dir"])
    path = run_dir.with_name(f"{run_dir.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def train(
    settings: dict[str, Any],
    ranks: Mapping[int, Mapping[str, str]] = {0: {}},
    *,
    deterministic: bool = False,
) -> None:
    """Train to the end in a process for each rank, with the environment given for it.

    Raises:
        RuntimeError: a rank failed; what it said is in the piece's log.
    """
    config = str(written(settings))
    program = [sys.executable, "-m", "gpu_first_parts.training", config]
    program += ["--deterministic"] if deterministic else []
    processes = [
        subprocess.Popen(program, env={**os.environ, **values}) for values in ranks.values()
    ]
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):  # the others wait for it in vain
            time.sleep(5)
            for process in processes:
                process.kill()
        time.sleep(0.1)
    if any(codes):
        raise RuntimeError(f"{settings['run_dir']}: exit codes {codes}; see the piece's log")


def rows_of(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """metrics.jsonl, without what is no figure of training: times and memory."""
    times = ("tokens_per_second", "memory_bytes")
    path = Path(settings["run_dir"]) / "metrics.jsonl"
    return [
        {name: value for name, value in row.items() if name not in times}
        for row in read_jsonl(path)
    ]
