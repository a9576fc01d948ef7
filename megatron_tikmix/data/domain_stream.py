"""Domain sample k, as a pure function of (seed, domain, k)."""

import logging
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_tikmix.data.domains import DomainSplit
from megatron_tikmix.data.samples import Sample
from megatron_tikmix.errors import InputError
from megatron_tikmix.seeds import derived_seed

# Each epoch's index is small and rebuilt in a millisecond: not saving it is intended.
logging.getLogger("megatron.core.datasets.gpt_dataset").setLevel(logging.ERROR)


class _EndOfDocument:
    """What GPTDataset asks of a tokenizer: the samples are tokens already."""

    def __init__(self, eod: int, vocab_size: int) -> None:
        self.eod = eod
        self.vocab_size = vocab_size
        self.special_tokens_dict = {"eod": eod}
        self.unique_identifiers = OrderedDict({"class": "end_of_document", "eod": str(eod)})


class DomainStream:
    """An endless stream of one domain's samples, in epochs.

    Every epoch is a megatron-core ``GPTDataset`` of exactly one pass, with a seed of its own,
    so sample k never depends on how many samples will be drawn. An epoch serves each of the
    ⌊(tokens − 1) / sequence_length⌋ samples once.

    Args:
        name: the domain, used in the seed and in messages.
        split: where the tokens are.
        documents: indices of the documents to serve, int (n,); None for all.

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
    ) -> None:
        self.name = name
        self.seed = seed
        self.sequence_length = sequence_length
        self._tokenizer = _EndOfDocument(eod, vocab_size)
        self._tokens = IndexedDataset(str(split.prefix), multimodal=False, mmap=True)
        if documents is None:
            documents = np.arange(self._tokens.sequence_lengths.shape[0])
        self._documents = documents.astype(np.int32)
        tokens = int(self._tokens.sequence_lengths[self._documents].sum(dtype=np.int64))
        self.samples_per_epoch = (tokens - 1) // sequence_length
        if self.samples_per_epoch < 1:
            raise InputError(
                f"domain {name}: its {tokens} tokens do not fill one sample of "
                f"data.sequence_length {sequence_length} + 1 tokens; shorten the sequences, add "
                f"text, or leave the domain out"
            )
        self._epoch = -1
        self._samples: GPTDataset | None = None

    def __getitem__(self, k: int) -> Sample:
        epoch, index = divmod(k, self.samples_per_epoch)
        if epoch != self._epoch:
            self._samples, self._epoch = self._open(epoch), epoch
        assert self._samples is not None
        # Copies: GPTDataset hands out one mask and one position vector for all samples.
        return {key: value.clone() for key, value in self._samples[index].items()}

    def _open(self, epoch: int) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=derived_seed(self.seed, self.name, epoch),
            sequence_length=self.sequence_length,
            tokenizer=self._tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        return GPTDataset(self._tokens, None, self._documents, None, Split.train, config)

    def padding(self) -> Sample:
        """A sample that counts for nothing: its loss is masked throughout."""
        sample: dict[str, Any] = self[0]
        sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        return sample
