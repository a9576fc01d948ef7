"""What a resumed run must have in common with its checkpoint, and what differs."""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_tikmix.config import RunConfig
from megatron_tikmix.data.builder import TrainingData

# What makes two models of the same configuration class different ones.
_ARCHITECTURE = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "softmax_scale",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "share_embeddings_and_output_weights",
    "make_vocab_size_divisible_by",
]


def fingerprint(config: RunConfig, data: TrainingData) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint, by configuration field.

    `tokens`, `files` and `tokenizer` are of the manifest; the latter two are None where it does
    not know them, and are compared with nothing then.
    """
    splits = {name: data.manifest.split(name, "train") for name in data.names}
    return {
        "seed": config.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.reset_position_ids": config.data.reset_position_ids,
        "data.reset_attention_mask": config.data.reset_attention_mask,
        "data.eod_mask_loss": config.data.eod_mask_loss,
        "train.global_batch_size": config.train.global_batch_size,
        "train.rampup_batch_size": config.train.rampup_batch_size,
        "domains": data.names,
        "tokens": {name: split.tokens for name, split in splits.items()},
        "files": {name: split.fingerprint for name, split in splits.items()},
        "tokenizer": data.manifest.tokenizer_fingerprint,
        "vocab_size": data.manifest.vocab_size,
        **{f"model.{name}": _plain(getattr(config.model, name, None)) for name in _ARCHITECTURE},
        "model.activation_func": config.model.activation_func.__name__,
    }


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return str(value) if isinstance(value, tuple | list) else value


def difference(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> str | None:
    """The first field that a checkpoint was saved with another value of, in words; or None.

    Args:
        saved, now: of :func:`fingerprint`; what only one of them has is not compared.
        allowed: fields that may differ, `checkpoint.allow_changed`.
    """
    for field, value in saved.items():
        if field not in now or now[field] == value:
            continue
        # Of domains, only that some were added can be meant.
        if field in allowed and not (field == "domains" and set(value) - set(now[field])):
            continue
        words = _in_words(field, value, now[field])
        if words is not None:
            return words
    return None


def _in_words(field: str, saved: Any, now: Any) -> str | None:
    if field == "domains" and set(saved) != set(now):
        gone, new = sorted(set(saved) - set(now)), sorted(set(now) - set(saved))
        parts = [
            f"domains {', '.join(names)}, which the run {verb}"
            for names, verb in ((gone, "does not have"), (new, "has added"))
            if names
        ]
        return ("with " if gone else "without ") + " and without ".join(parts)
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in saved:
            if name in now and None not in (saved[name], now[name]) and saved[name] != now[name]:
                return f"with {field} of {name} {saved[name]}, and the run has {now[name]}"
        return None
    if field == "tokenizer" and None in (saved, now):
        return None
    return f"with {field} {saved}, and the run has {now}"
