"""The type of a training sample, and how samples become a micro-batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Sample = dict[str, torch.Tensor]
"""tokens, labels, position_ids (int64) and loss_mask (float32), each (sequence_length,).
Training samples also have ``domain``, the index of their domain, int64 (). A micro-batch is
the same with a leading dimension, micro_batch_size."""


def stack(samples: Sequence[Sample]) -> Sample:
    """Stack samples to a micro-batch of tensors (micro_batch_size, sequence_length)."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


@dataclass(frozen=True)
class DocumentBoundaries:
    """The effect of the end-of-document tokens inside a sample; none by default.

    The three switches have the names and effects of those in megatron-core's GPTDatasetConfig.
    They are applied to a micro-batch on its device: a dataset would have to pass masks of
    sequence_length² elements through worker processes.
    """

    eod: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False

    def applied(self, batch: Sample) -> Sample:
        """Return the micro-batch with its masks and positions changed.

        ``attention_mask`` is bool (micro_batch_size, 1, sequence_length, sequence_length), true
        where attention is cut off.
        """
        tokens = batch["tokens"]
        ends = tokens == self.eod  # the token itself belongs to the document that it ends
        places = torch.arange(tokens.shape[1], device=tokens.device)
        changed = dict(batch)
        if self.reset_attention_mask:
            document = ends.cumsum(dim=1) - ends.long()
            visible = document[:, :, None] == document[:, None, :]
            visible &= places[:, None] >= places[None, :]
            changed["attention_mask"] = ~visible[:, None]
        if self.reset_position_ids:
            first = torch.zeros_like(tokens)
            first[:, 1:] = torch.where(ends[:, :-1], places[1:], 0)
            changed["position_ids"] = places - first.cummax(dim=1).values
        if self.eod_mask_loss:
            changed["loss_mask"] = batch["loss_mask"].masked_fill(ends, 0.0)
        return changed
