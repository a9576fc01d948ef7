"""Streams of a domain's samples: sample k is a pure function of (seed, domain, k)."""

import hashlib
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import get_worker_info

from megatron_tikmix.data.domains import DomainSplit
from megatron_tikmix.data.open_files import RecentlyUsed, TokenFile
from megatron_tikmix.data.token_files import AGAIN
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.samples import Sample
from megatron_tikmix.seeds import derived_seed

# The warning is about indices that are not saved: small ones are rebuilt in a millisecond.
logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.ERROR)

SMALL_INDEX_BYTES = 2**18
"""Each rank keeps indices up to this size in memory; larger ones are on disk, shared by ranks."""


class _EndOfDocument:
    """The part of a tokenizer that GPTDataset needs for data that is already tokenised."""

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.special_tokens_dict = {"eod": eod}
        self.unique_identifiers = OrderedDict({"class": "end_of_document", "eod": str(eod)})


class _Epoch(GPTDataset):
    """A GPTDataset that skips the work on padding and masks.

    The samples here are never padded, and document boundaries are applied to whole micro-batches.
    """

    def __getitem__(self, index: int | None) -> Sample:
        # The other values it returns depend on the version of megatron-core.
        text = self._query_document_sample_shuffle_indices(index)[0]
        tokens = torch.from_numpy(text).long()
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": torch.ones(len(tokens) - 1),
            "position_ids": self._positions,
        }

    @cached_property
    def _positions(self) -> torch.Tensor:
        return torch.arange(self.config.sequence_length)


# Each costs 3 descriptors and 3 memory maps.
_OPEN_INDICES: RecentlyUsed[_Epoch] = RecentlyUsed(64)


def some_documents(
    lengths: np.ndarray, tokens: int, *, samples: int, sequence_length: int, seed: int
) -> np.ndarray | None:
    """Draw documents for a stream of which only the first `samples` samples are read.

    An index of a whole domain takes seconds and hundreds of megabytes for billions of tokens. The
    drawn documents hold twice as many samples as needed, and their effective number, (Σl)²/Σl² for
    lengths l, is at least four for each sample, so that few samples come from the same document.

    Args:
        lengths: tokens of each document of the domain, int32 (documents,).
        tokens: number of tokens of the domain.

    Returns:
        sorted indices, int64 (n,); None, for all documents, if the whole index is small anyway or
        half of the documents would not be enough.
    """
    if _index_bytes(tokens // sequence_length, len(lengths)) <= SMALL_INDEX_BYTES:
        return None
    generator = np.random.default_rng(seed)
    count = 16 * samples
    while count <= len(lengths) // 2:
        drawn = np.sort(generator.choice(len(lengths), count, replace=False, shuffle=False))
        held = lengths[drawn].astype(np.float64)
        enough = held.sum() >= 2 * samples * sequence_length
        if enough and held.sum() ** 2 >= 4 * samples * (held**2).sum():
            return drawn
        count *= 2
    return None


def _index_bytes(samples: int, documents: int) -> int:
    """Return the size of an index: each sample's start, and the orders of samples and documents."""
    return 12 * samples + 4 * documents


class DomainStream:
    """An endless stream of one domain's samples, in epochs.

    Every epoch is a megatron-core ``GPTDataset`` of exactly one pass, with a seed of its own,
    so sample k never depends on how many samples will be drawn. An epoch serves each of the
    ⌊(tokens − 1) / sequence_length⌋ samples once. Making a stream opens no file, and all streams
    of a process together have a bounded number of files open at a time.

    A sample's ``tokens`` and ``labels`` are views of the same memory, and all samples share
    ``position_ids``; batches are copies.

    Args:
        name: the domain, used in the seed and in messages.
        split: the domain's files, with the number of tokens.
        documents: indices of the documents to serve, int (n,); None for all.
        index_folder: where the indices of large epochs are kept, for all ranks; None: in memory.

    Raises:
        InputError: the tokens do not fill one sample.
    """

    def __init__(
        self,
        name: str,
        split: DomainSplit,
        *,
        seed: int,
        sequence_length: int,
        eod: int,
        vocab_size: int,
        documents: np.ndarray | None = None,
        index_folder: Path | None = None,
    ) -> None:
        self.name = name
        self.seed = seed
        self.sequence_length = sequence_length
        self._tokenizer = _EndOfDocument(eod, vocab_size)
        self._split = split
        self._tokens = TokenFile(split.prefix)
        self._documents = None if documents is None else documents.astype(np.int32)
        tokens, count = split.tokens, split.documents
        if self._documents is not None:
            count = len(self._documents)
            tokens = int(self._tokens.sequence_lengths[self._documents].sum(dtype=np.int64))
        self.samples_per_epoch = (tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise InputError(
                f"domain {name}: its {tokens} tokens do not fill one sample of "
                f"data.sequence_length {sequence_length} + 1 tokens; shorten the sequences, add "
                f"text, or leave the domain out"
            )
        small = _index_bytes(self.samples_per_epoch, count) <= SMALL_INDEX_BYTES
        self._index_folder = None if small or documents is not None else index_folder
        self._epochs: dict[int, _Epoch] = {}  # in memory
        self._shared: dict[int, Path] = {}  # on disk

    def __getitem__(self, k: int) -> Sample:
        epoch, index = divmod(k, self.samples_per_epoch)
        sample: Sample = self._samples_of(epoch)[index]
        return sample

    def epochs_of(self, first_k: int, end_k: int) -> range:
        """Return the epochs that contain the samples from `first_k` to below `end_k`."""
        n = self.samples_per_epoch
        return range(first_k // n, -(-end_k // n) if end_k > first_k else first_k // n)

    def write_indices(self, epochs: Iterable[int]) -> None:
        """Write the large indices among those of these epochs to disk. Call it on one rank only.

        If an index cannot be written, each rank builds it in memory.
        """
        for epoch in epochs:
            path = self._index_path(epoch)
            if path is None or path.is_dir():
                continue
            unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            try:
                self._build(epoch, unfinished)
                os.rename(unfinished, path)
            except OSError as error:
                logging.getLogger(__name__).warning(
                    "domain %s: the index of epoch %d is not shared, and each rank builds its "
                    "own: %s",
                    self.name,
                    epoch,
                    error,
                )
                shutil.rmtree(unfinished, ignore_errors=True)

    def prepare(self, epochs: Iterable[int]) -> None:
        """Load the indices of these epochs and drop all others; keep all if there are none."""
        epochs = list(epochs)
        if not epochs:
            return
        former, self._epochs, self._shared = self._epochs, {}, {}
        for epoch in epochs:
            path = self._index_path(epoch)
            if path is not None and path.is_dir():
                self._shared[epoch] = path
            else:
                self._epochs[epoch] = former.get(epoch) or self._build(epoch)

    def _samples_of(self, epoch: int) -> _Epoch:
        samples = self._epochs.get(epoch)
        if samples is not None:  # as a rule
            return samples
        if epoch not in self._shared:
            if get_worker_info() is not None:
                raise RuntimeError(f"domain {self.name}: epoch {epoch} was not prepared")
            self.prepare([epoch])
        if epoch in self._epochs:
            return self._epochs[epoch]
        path = self._shared[epoch]
        return _OPEN_INDICES.get(path, lambda: self._build(epoch, path))

    def _index_path(self, epoch: int) -> Path | None:
        """Return the path of an epoch's index; None if it is kept in memory."""
        if self._index_folder is None:
            return None
        index = self._split.idx_path.stat()
        parts = (
            self._split.prefix.absolute(),
            self._split.tokens,
            index.st_size,
            index.st_mtime_ns,
            self.seed,
            self.sequence_length,
            self._tokenizer.eod,
            self._tokenizer.vocab_size,
            megatron.core.__version__,
            _Epoch.__name__,  # part of the files' names
        )
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        return self._index_folder / f"{self.name}-epoch{epoch}-{key}"

    def _build(self, epoch: int, folder: Path | None = None) -> _Epoch:
        """Build the epoch's samples, with the index read from `folder`, or written there."""
        config = GPTDatasetConfig(
            random_seed=derived_seed(self.seed, self.name, epoch),
            sequence_length=self.sequence_length,
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            path_to_cache=None if folder is None else str(folder),
        )
        documents = self._documents
        if documents is None:
            documents = np.arange(len(self._tokens.sequence_lengths), dtype=np.int32)
        samples = _Epoch(self._tokens, None, documents, None, Split.train, config)
        if len(samples) != self.samples_per_epoch:
            raise InputError(
                f"domain {self.name}: {self._split.idx_path} does not hold the "
                f"{self._split.tokens} tokens that its manifest says; {AGAIN}"
            )
        return samples

    def padding(self) -> Sample:
        """Return a sample whose loss is masked throughout, to fill a micro-batch."""
        sample: dict[str, Any] = self[0]
        sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        return sample
