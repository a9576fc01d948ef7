"""A change to a training run: it writes down which samples it reads."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from megatron_tikmix.data.dataset import BlendedDataset
from megatron_tikmix.megatron.samples import Sample


@contextmanager
def recording(folder: str) -> Iterator[None]:
    """Append index, domain and tokens of each sample read here to ``FOLDER/RANK.jsonl``."""
    read = BlendedDataset.__getitems__
    record = Path(folder) / f"{os.environ.get('RANK', '0')}.jsonl"

    def recorded(self: BlendedDataset, indices: Sequence[int]) -> list[Sample]:
        samples = read(self, indices)
        with record.open("a") as file:
            for index, sample in zip(indices, samples, strict=True):
                tokens = hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest()
                file.write(json.dumps([index, sample["domain"].item(), tokens]) + "\n")
        return samples

    with mock.patch.object(BlendedDataset, "__getitems__", recorded):
        yield
