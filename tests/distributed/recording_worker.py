"""``python -m megatron_tikmix``, writing down which samples were read: index, domain and tokens.

Every rank appends to $RECORD_FOLDER/<rank>.jsonl.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tikmix.__main__ import main
from megatron_tikmix.data.dataset import BlendedDataset
from megatron_tikmix.data.samples import Sample

_read = BlendedDataset.__getitems__
_record = Path(os.environ["RECORD_FOLDER"]) / f"{os.environ.get('RANK', '0')}.jsonl"


def _recorded(self: BlendedDataset, indices: Sequence[int]) -> list[Sample]:
    samples = _read(self, indices)
    with _record.open("a") as file:
        for index, sample in zip(indices, samples, strict=True):
            tokens = hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest()
            file.write(json.dumps([index, sample["domain"].item(), tokens]) + "\n")
    return samples


BlendedDataset.__getitems__ = _recorded  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
