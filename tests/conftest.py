"""Shared fixtures: a tiny corpus of random tokens, and a run configuration over it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings as hypothesis_settings
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_tikmix.data.domains import DomainManifest, DomainSplit
from megatron_tikmix.data.tokenizer import TokenizerFiles
from megatron_tikmix.decision.ledger import LEDGER, BankFile

# A busy machine is no fault of the code.
hypothesis_settings.register_profile("untimed", deadline=None)
hypothesis_settings.load_profile("untimed")

VOCAB_SIZE = 250
EOD = 0
ROOT = Path(__file__).parent.parent


def write_tokens(prefix: Path, documents: list[np.ndarray]) -> DomainSplit:
    """A `.bin/.idx` pair of these documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return DomainSplit(prefix, len(documents), sum(len(document) for document in documents))


def random_documents(seed: int, low: int, high: int, count: int) -> list[np.ndarray]:
    """Documents of 20 to 60 tokens that count upwards within [low, high), with some noise."""
    generator = np.random.default_rng(seed)
    documents = []
    for _ in range(count):
        length = int(generator.integers(20, 61))
        steps = generator.choice([1, 1, 1, 2, 5], size=length).cumsum()
        tokens = low + (generator.integers(high - low) + steps) % (high - low)
        documents.append(np.append(tokens, EOD))
    return documents


def build_corpus(folder: Path) -> Path:
    """Three domains: `low` and `high` count upwards in halves of the vocabulary, `junk` not."""
    ranges = {"low": (1, 120), "high": (120, VOCAB_SIZE), "junk": (1, VOCAB_SIZE)}
    domains: dict[str, dict[str, DomainSplit]] = {}
    for index, (name, (low, high)) in enumerate(ranges.items()):
        domains[name] = {}
        for split, count in (("train", 120), ("validation", 40)):
            documents = random_documents(17 * index + len(split), low, high, count)
            if name == "junk":
                generator = np.random.default_rng(len(split))
                documents = [generator.permutation(document) for document in documents]
            domains[name][split] = write_tokens(folder / f"{name}_{split}", documents)
    tokenizer = TokenizerFiles(write_word_tokenizer(folder / "tokenizer.json"))
    manifest = DomainManifest(folder / "domains.yaml", tokenizer, VOCAB_SIZE, EOD, domains)
    manifest.save()
    return manifest.path


def write_word_tokenizer(path: Path) -> Path:
    """A tokenizer to which `w17` is the token 17."""
    words = {f"w{number}": number for number in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=f"w{VOCAB_SIZE - 1}"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


def write_prompts(path: Path, count: int = 30) -> Path:
    """Prompts of 0 to 39 words and completions of 1 to 41, some with the same prompt."""
    generator = np.random.default_rng(5)
    lines: list[str] = []
    for number in range(count):
        if number % 5 or not lines:
            prompt = " ".join(f"w{n}" for n in generator.integers(1, VOCAB_SIZE, number % 13 * 3))
        words = [f"w{n}" for n in generator.integers(1, VOCAB_SIZE, 1 + number**2 % 41)]
        lines.append(json.dumps({"prompt": prompt + " ", "completion": " ".join(words)}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts and completions."""
    return write_prompts(tmp_path_factory.mktemp("prompts") / "quiz.jsonl")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a tiny corpus, made once."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that takes seconds: 12 iterations, boundaries at 4 and 8."""
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "make_vocab_size_divisible_by": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "data": {
            "manifest": str(corpus),
            "sequence_length": 32,
            "initial_mixture": "uniform",
        },
        "tasks": {"low": {"domain": "low"}, "high": {"domain": "high"}},
        "train": {
            "train_iters": 12,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "log_interval": 2,
        },
        "optimizer": {"lr": 2e-3, "adam_beta2": 0.2, "weight_decay": 0.01},
        "remix": {"interval_samples": 32, "influence": "marginal"},
        # Intervals this short cost less than what is measured at their ends.
        "probe": {"sub_batch_samples": 4, "task_samples": 12, "max_overhead": None},
        "evaluate": {"task_samples": 12},
    }


def overridden(settings: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`settings` with ``{"section.field": value}`` put in."""
    result = copy.deepcopy(settings)
    for name, value in overrides.items():
        *sections, field = name.split(".")
        place = result
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return result


def forget_attention_backend() -> None:
    """Unset what holds this process, and those that it starts, to one `attention_backend`."""
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        os.environ.pop(name, None)


def let_go_of_models() -> None:
    """Free what a run in this process was made of, once its process groups are gone.

    Hooks of autograd hold megatron-core's DistributedDataParallel in a cycle that is never
    collected, and so the threads of its process groups: by the thousand, over all tests.
    """
    from megatron.core.distributed import DistributedDataParallel

    forget_attention_backend()
    for chunk in [each for each in gc.get_objects() if type(each) is DistributedDataParallel]:
        vars(chunk).clear()
    gc.collect()


def read_rows(run_dir: str | Path, name: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file of a run; those of the ledger with their banks."""
    rows = [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]
    for row in rows if name == LEDGER else ():
        if bank := row["bank"]:
            row["bank"] = BankFile(bank["file"], bank["sha256"], Path(run_dir)).read().to_json()
    return rows


def without_timings(value: Any) -> Any:
    """The same rows without the fields that are seconds, per second, or memory."""
    if isinstance(value, dict):
        return {
            key: without_timings(item)
            for key, item in value.items()
            if not key.endswith(("_seconds", "_per_second", "memory_bytes"))
        }
    return [without_timings(item) for item in value] if isinstance(value, list) else value
