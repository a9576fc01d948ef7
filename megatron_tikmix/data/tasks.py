"""Validation tasks: held-out splits, cut into items that decide and items that report."""

from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.samples import Sample, stack
from megatron_tikmix.errors import InputError
from megatron_tikmix.seeds import derived_seed


@dataclass(frozen=True)
class Task:
    """A validation task.

    Attributes:
        decide: stream of the items whose gradient decides the next mixture.
        report: stream of the items whose loss is reported; no document is in both.
    """

    name: str
    decide: DomainStream
    report: DomainStream


def build_task(
    name: str, domain: str, manifest: DomainManifest, *, seed: int, sequence_length: int
) -> Task:
    """The task on the held-out split of `domain`, its documents divided in two by `seed`.

    Raises:
        InputError: the split is missing, or one half does not fill a sample.
    """
    split = manifest.split(domain, "validation")
    tokens = IndexedDataset(str(split.prefix), multimodal=False, mmap=True)
    lengths = tokens.sequence_lengths.copy()  # its memory map closes with it
    order = np.random.default_rng(derived_seed(seed, "task", domain)).permutation(len(lengths))
    # Halves of equal tokens, not documents: one long document must not empty a half.
    half = int(np.searchsorted(np.cumsum(lengths[order]), lengths.sum() / 2, side="right"))

    def stream(documents: np.ndarray, role: str) -> DomainStream:
        try:
            return DomainStream(
                f"{domain}/{role}",
                split,
                seed=seed,
                sequence_length=sequence_length,
                eod=manifest.eod,
                vocab_size=manifest.vocab_size,
                documents=np.sort(documents),
            )
        except InputError as error:
            raise InputError(
                f"task {name}: the validation split of domain {domain} is too short to be cut "
                f"into items that decide and items that report ({error})"
            ) from error

    return Task(name, stream(order[:half], "decide"), stream(order[half:], "report"))


def micro_batches(
    stream: DomainStream,
    samples: range,
    *,
    micro_batch_size: int,
    rank: int,
    size: int,
    multiple: int = 1,
) -> list[Sample]:
    """Data-parallel rank `rank`'s micro-batches of the stream's `samples`.

    Every rank gets the same number of full micro-batches, a multiple of `multiple`; what is
    missing is padded with samples whose loss is masked, so sums over tokens are the same for
    every layout.
    """
    group = micro_batch_size * size
    groups = -(-len(samples) // (group * multiple)) * multiple
    batches = []
    for index in range(groups):
        first = index * group + rank * micro_batch_size
        places = range(first, first + micro_batch_size)
        batches.append(
            stack([stream[samples[p]] if p < len(samples) else stream.padding() for p in places])
        )
    return batches
