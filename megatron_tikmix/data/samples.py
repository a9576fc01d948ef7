"""What one training sample is, and how samples become a micro-batch."""

from collections.abc import Sequence

import torch

Sample = dict[str, torch.Tensor]
"""tokens, labels, position_ids (int64) and loss_mask (float32), each (sequence_length,).
Training samples also have ``domain``, the index of their domain, int64 (). A micro-batch is
the same with a leading dimension, micro_batch_size."""


def stack(samples: Sequence[Sample]) -> Sample:
    """A micro-batch: each tensor (micro_batch_size, sequence_length)."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
