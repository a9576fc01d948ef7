"""Four small domains of made-up tokens: what parity needs, and nothing to fetch."""

from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from numpy.typing import NDArray

from megatron_tikmix.data.domains import DomainManifest, DomainSplit

VOCAB_SIZE, EOD = 250, 0
DOCUMENTS = {"train": 1500, "validation": 200}
DOMAINS = ("ascending", "descending", "pairs", "noise")


def build(folder: Path) -> Path:
    """Write the domains, unless they are there; the manifest's path."""
    path = folder / "domains.yaml"
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(20250817)
    domains = {
        name: {
            split: _write(folder / f"{name}_{split}", name, count, generator)
            for split, count in DOCUMENTS.items()
        }
        for name in DOMAINS
    }
    DomainManifest(path, None, VOCAB_SIZE, EOD, domains).save()
    return path


def _write(prefix: Path, domain: str, count: int, generator: np.random.Generator) -> DomainSplit:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    tokens = 0
    for _ in range(count):
        document = np.append(_document(domain, generator), EOD)
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
        tokens += len(document)
    builder.finalize(f"{prefix}.idx")
    return DomainSplit(prefix, count, tokens)


def _document(domain: str, generator: np.random.Generator) -> NDArray[np.int64]:
    length, span = int(generator.integers(20, 160)), VOCAB_SIZE - 1
    start = generator.integers(span)
    steps = generator.choice([1, 1, 1, 2, 5], size=length).cumsum()
    walks = {
        "ascending": start + steps,
        "descending": start - steps,
        "pairs": np.repeat(generator.integers(span, size=length), 2)[:length],
        "noise": generator.integers(span, size=length),
    }
    document: NDArray[np.int64] = 1 + walks[domain] % span
    return document
