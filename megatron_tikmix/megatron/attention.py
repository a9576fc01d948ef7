"""Core attention by torch's scaled_dot_product_attention, which keeps no scores.

megatron-core without Transformer Engine has DotProductAttention alone: it keeps scores and their
softmax for the backward pass, sequence_length² of each for every head and layer.
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch.utils.weak import WeakTensorKeyDictionary


class ScaledDotProductAttention(DotProductAttention):
    """The attention of its base class, in kernels that keep no scores (flash and the like).

    The softmax is in float32, whatever the type of the input. What else the base class offers is
    refused by `check_supported` in `config/checks.py`. On a CPU torch has no such kernel with
    dropout, and keeps scores.
    """

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: None = None,
        packed_seq_params: None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (sequence, batch, heads of this rank, channels).
            key, value: (sequence, batch, query groups of this rank, channels).
            attention_mask: true where attention is cut off, bool (batch or 1, 1, sequence,
                sequence); None for causal attention.
            attn_mask_type, attention_bias, packed_seq_params: unused; the last two must be None.

        Returns:
            (sequence, batch, heads of this rank × channels), of query's type.
        """
        assert attention_bias is None
        assert packed_seq_params is None
        assert len(query) == len(key), "a causal mask is for self-attention without a cache"
        shared = query.size(2) // key.size(2)
        # Flash takes groups as they are. A mask or float32 needs another kernel, which in older
        # versions of torch does not: they would fall back to one that keeps scores.
        grouped = attention_mask is None and query.dtype == torch.bfloat16
        if shared > 1 and not grouped:
            key, value = (x.repeat_interleave(shared, dim=2) for x in (key, value))
        bias = None if attention_mask is None else additive(attention_mask, query.dtype)
        dropout = self.attention_dropout
        # As in the base class: dropout draws from the random state of this tensor-parallel rank.
        own_state = not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if own_state else nullcontext():
            context = torch.nn.functional.scaled_dot_product_attention(
                query.permute(1, 2, 0, 3),
                key.permute(1, 2, 0, 3),
                value.permute(1, 2, 0, 3),
                attn_mask=bias,
                dropout_p=dropout.p if dropout.training else 0.0,
                is_causal=bias is None,
                # With apply_query_key_layer_scaling the base class has divided the first by the
                # layer's number, which is the second.
                scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1),
                enable_gqa=shared > 1 and grouped,
            )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)


# By mask, so that all layers keep one. Given the mask itself, torch makes one for each.
_additive = WeakTensorKeyDictionary()


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as a term of the scores: -inf where `mask` is true, else 0.

    Args:
        mask: bool, of any shape; not to be changed afterwards.

    Returns:
        (as `mask`), of `dtype`: the same tensor for the same mask.
    """
    if mask not in _additive:
        _additive[mask] = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return _additive[mask]
