"""Parameter counts and floating-point operations of a GPT, from its configuration alone."""

from megatron_tikmix.config import GPTConfig
from megatron_tikmix.megatron.model import padded_vocab_size


def layer_parameters(model: GPTConfig) -> int:
    """Count the weights of one transformer layer's matrices, without norms and biases."""
    heads, kv_channels = model.num_attention_heads, model.kv_channels
    query, groups = heads * kv_channels, model.num_query_groups or heads
    attention = model.hidden_size * (2 * query + 2 * groups * kv_channels)
    mlp = model.hidden_size * (model.ffn_hidden_size or 0) * (3 if model.gated_linear_unit else 2)
    return int(attention + mlp)


def parameters_per_rank(model: GPTConfig, vocab_size: int, sequence_length: int) -> int:
    """Estimate the parameters of the fullest pipeline stage on one tensor-parallel rank."""
    pp, tp = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
    embedding = padded_vocab_size(vocab_size, model) * model.hidden_size
    untied = not model.share_embeddings_and_output_weights
    embeddings = embedding * (2 if untied and pp == 1 else 1)
    total = (model.num_layers // pp * layer_parameters(model) + embeddings) // tp
    if model.position_embedding_type == "learned_absolute":
        total += sequence_length * model.hidden_size
    return total


def flops_per_token(model: GPTConfig, vocab_size: int, sequence_length: int) -> float:
    """Return the FLOPs of one token, forward and backward: 6 for each weight, and attention's.

    The backward pass counts twice the forward; recomputed activations are not counted.
    """
    weights = model.num_layers * layer_parameters(model)
    weights += padded_vocab_size(vocab_size, model) * model.hidden_size  # the output layer
    # Scores, and their product with the values, over the mean number of positions seen.
    query = model.num_attention_heads * model.kv_channels
    attention = model.num_layers * 4 * query * sequence_length / 2
    return 3.0 * (2 * weights + attention)
