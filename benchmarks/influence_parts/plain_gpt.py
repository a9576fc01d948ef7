"""A GPT of torch.nn modules alone that takes GPTModel's weights as they are.

Same names, same layout (fused query-key-value of one head after the other, gated MLP with both
halves in one matrix), so `load_state_dict` is all it takes. For dense models with RMSNorm, SiLU
gates, rotary positions, tied embeddings and no biases.
"""

import torch
from torch import nn
from torch.nn import functional as F

from megatron_tikmix.config import GPTConfig


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.rotary_base = config.rotary_base
        width = config.hidden_size
        self.linear_qkv = nn.Linear(width, 3 * width, bias=False)
        self.linear_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, width = x.shape
        q, k, v = self.linear_qkv(x).view(n, s, self.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        q, k = self._rotated(q), self._rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.linear_proj(mixed.transpose(1, 2).reshape(n, s, width))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        steps = torch.arange(0, size, 2, dtype=torch.float32) / size
        angles = torch.outer(
            torch.arange(x.shape[-2], dtype=torch.float32), 1 / self.rotary_base**steps
        )
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class GatedMLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.linear_fc2 = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.linear_fc1(x).chunk(2, dim=-1)
        return self.linear_fc2(F.silu(gate) * value)


class Layer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = Attention(config)
        self.pre_mlp_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = GatedMLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.pre_mlp_layernorm(x))


class Embedding(nn.Module):
    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, config.hidden_size)


class Decoder(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(config) for _ in range(config.num_layers)))
        self.final_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.final_layernorm(self.layers(x))


class PlainGPT(nn.Module):
    """Logits (n, s, vocabulary) of tokens (n, s)."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.embedding = Embedding(config, vocab_size)
        self.decoder = Decoder(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        words = self.embedding.word_embeddings
        # The tied output layer is no module of its own.
        return F.linear(self.decoder(words(tokens)), words.weight)


def plain_copy(model: nn.Module, config: GPTConfig) -> PlainGPT:
    """GPTModel's weights in a :class:`PlainGPT`; strict, so what does not fit is refused."""
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
    }
    plain = PlainGPT(config, len(weights["embedding.word_embeddings.weight"]))
    plain.load_state_dict({k: v for k, v in weights.items() if "rotary" not in k})
    return plain
