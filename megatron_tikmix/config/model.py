"""Section `model`: megatron-core's TransformerConfig, and what its GPTModel takes besides."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tikmix.errors import require


@dataclass(kw_only=True)
class GPTConfig(TransformerConfig):
    """megatron-core's TransformerConfig, and the arguments of its GPTModel."""

    # The type of megatron-core 0.19 names its argument, which the command line cannot resolve.
    activation_func: Callable = torch.nn.functional.gelu
    """Activation of the MLP, by its import path: `torch.nn.functional.silu`."""

    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "rope"
    """How positions are encoded."""

    rotary_base: int = 10000
    """Base period of rotary position embeddings."""

    rotary_percent: float = 1.0
    """Share of each head's dimensions that is rotated."""

    share_embeddings_and_output_weights: bool = True
    """Use the word embedding as the output layer's weight too."""

    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this. Every layout pads to the same size, so
    tensor_model_parallel_size must divide it."""

    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layer implementation; `auto` takes Transformer Engine on a GPU where it is installed."""

    # A field of megatron-core, which heeds it with Transformer Engine only.
    attention_backend: AttnBackend = AttnBackend.auto
    """Without Transformer Engine, `flash` and `fused` are torch's scaled_dot_product_attention,
    which takes memory linear in sequence_length; `local` and `unfused` are megatron-core's
    DotProductAttention, which takes quadratic; `auto` is the former on a GPU and the latter on a
    CPU. To Transformer Engine they are its own kernels, and it has no `local`."""

    # What GPTModel computes here must not depend on a knob that would silently change the loss.
    calculate_per_token_loss: bool = True
    """Losses and gradients are means over unmasked tokens; influence relies on it."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "make_vocab_size_divisible_by",
        ):
            require(getattr(self, name) > 0, f"model.{name}", "must be given, and positive")
        for name in ("hidden_dropout", "attention_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", "must be from 0 to below 1")
        require(0 < self.rotary_percent <= 1, "model.rotary_percent", "must be from 0 to 1")
        require(self.rotary_base > 0, "model.rotary_base", "must be positive")
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "model.sequence_parallel",
            "needs tensor_model_parallel_size 2 or more",
        )
        self.params_dtype = self.pipeline_dtype = torch.bfloat16 if self.bf16 else torch.float32
        settle_pipeline(self)
        super().__post_init__()

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether layers come from Transformer Engine: on request, or on a GPU that has it."""
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if self.transformer_impl != "auto":
            return self.transformer_impl == "transformer_engine"
        return torch.cuda.is_available() and bool(HAVE_TE)

    @property
    def uses_torch_attention(self) -> bool:
        """Whether torch's attention stands in for megatron-core's, which keeps scores."""
        if self.uses_transformer_engine:
            return False
        if self.attention_backend is AttnBackend.auto:
            return torch.cuda.is_available()
        return self.attention_backend in (AttnBackend.flash, AttnBackend.fused)


def settle_pipeline(config: TransformerConfig) -> None:
    """Make pipeline stages exchange the right tensors; call it before `config.__post_init__`.

    One of the faults of megatron-core in `megatron/faults.py`.

    With `overlap_p2p_comm` an output is freed before its send is waited for. Interleaved without
    overlap, two stages mix up their messages: losses are wrong, and nothing says so. Overlapping
    is also Megatron's default.
    """
    config.deallocate_pipeline_outputs = False
    if config.virtual_pipeline_model_parallel_size:
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
