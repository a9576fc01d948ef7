"""What a rank's accelerator has to hold, from the configuration alone: an estimate."""

from dataclasses import dataclass

from megatron_tikmix.config import RunConfig
from megatron_tikmix.training.flops import layer_parameters, parameters_per_rank
from megatron_tikmix.training.model import padded_vocab_size

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Of the fullest rank; bytes. Allocator, NCCL and CUDA itself are not in it."""

    parameters: int
    """Of the whole model."""

    rank_parameters: int
    """Of this rank."""

    weights: int
    gradients: int

    optimizer: int
    """Main parameters where the weights are bf16, and Adam's two moments; this rank's share."""

    activations: int
    """Between forward and backward, all micro-batches in flight."""

    kept_gradients: int
    """What a probe keeps, on top of all the others; 0 without one."""

    @property
    def total(self) -> int:
        return (
            self.weights + self.gradients + self.optimizer + self.activations + self.kept_gradients
        )

    def in_words(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "validation gradients at a boundary": self.kept_gradients,
        }
        listed = " + ".join(f"{name} {size / _GIB:.3g}" for name, size in parts.items() if size)
        return (
            f"{in_short(self.parameters)} parameters, {in_short(self.rank_parameters)} on the "
            f"fullest rank: {listed} = about {self.total / _GIB:.3g} GiB"
        )


def in_short(count: int) -> str:
    """1,236 M as `1.24 B`."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def plan_memory(
    config: RunConfig, world_size: int, vocab_size: int, kept_gradients: int
) -> MemoryPlan:
    """The estimate for `world_size` ranks.

    Args:
        kept_gradients: bytes that a probe keeps on the fullest rank.
    """
    model, length = config.model, config.data.sequence_length
    embedding = padded_vocab_size(vocab_size, model) * model.hidden_size
    tables = 1 if model.share_embeddings_and_output_weights else 2
    on_rank = parameters_per_rank(model, vocab_size, length)
    shared = config.data_parallel_size(world_size)
    gradient = 4 if config.ddp.grad_reduce_in_fp32 or not model.bf16 else 2
    return MemoryPlan(
        parameters=model.num_layers * layer_parameters(model) + tables * embedding,
        rank_parameters=on_rank,
        weights=on_rank * (2 if model.bf16 else 4),
        gradients=on_rank * gradient,
        optimizer=on_rank * (12 if model.bf16 else 8) // shared,
        activations=_activations(config, vocab_size),
        kept_gradients=kept_gradients,
    )


def _activations(config: RunConfig, vocab_size: int) -> int:
    """After Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
    (arXiv 2205.05198), section 4, for these shapes, without dropout's masks.

    The first pipeline stage holds as many micro-batches as there are stages, so all of the model's
    layers for one of them, and a little more where stages are interleaved. Flash attention
    (Transformer Engine) and selective recomputation keep no scores.
    """
    model, batch = config.model, config.train.micro_batch_size
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    tokens, width = batch * config.data.sequence_length, 2 if model.bf16 else 4
    hidden, ffn = model.hidden_size, model.ffn_hidden_size or 0
    query = model.num_attention_heads * model.kv_channels
    keys = 2 * (model.num_query_groups or model.num_attention_heads) * model.kv_channels
    whole = 4 * hidden  # the inputs of two norms, of attention and of the MLP
    split = 2 * query + keys + (3 if model.gated_linear_unit else 2) * ffn
    per_token = whole / (tp if model.sequence_parallel else 1) + split / tp
    scores = model.num_attention_heads * config.data.sequence_length / tp  # and their softmax
    flash = model.transformer_impl == "transformer_engine"
    if not flash and model.recompute_granularity != "selective":
        per_token += 2 * scores
    if model.recompute_granularity == "full":
        per_token = hidden / (tp if model.sequence_parallel else 1)
    layers: float = model.num_layers
    stages = model.virtual_pipeline_model_parallel_size
    if stages and pp > 1:
        layers *= 1 + (pp - 1) / (pp * stages)
    logits = padded_vocab_size(vocab_size, model) / tp * (width + 4)  # and their float32 softmax
    return int(tokens * (layers * per_token * width + (logits if pp == 1 else 0)))
