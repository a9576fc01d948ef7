"""The plan printed before a run: what it will do, its probe's cost, the memory it needs."""

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch

from megatron_tikmix.config import RunConfig
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.tasks import Task
from megatron_tikmix.measure.boundary_cost import UTILISATION, boundary_cost
from megatron_tikmix.measure.flops import layer_parameters, parameters_per_rank
from megatron_tikmix.measure.probe_plan import Trained, plan_probe
from megatron_tikmix.megatron.model import padded_vocab_size
from megatron_tikmix.mixture.repetition import planned_samples


def describe(config: RunConfig, world_size: int, data: TrainingData) -> str:
    """The plan, one line a subject.

    Raises:
        InputError: the probe costs more than `probe.max_overhead` allows.
    """
    return "\n".join(
        f"{subject:<12} {text}"
        for subject, text in (
            ("layout", _layout(config, world_size)),
            ("memory", _memory(config, world_size, data)),
            ("training", _training(config)),
            ("domains", _domains(config, data)),
            ("tasks", ", ".join(map(_task, data.tasks))),
            ("mixture", _mixture(config, data)),
            ("repetition", _repetition(config, data)),
            ("probe", _probe(config, world_size, data)),
            ("boundary", _boundary(config, world_size, data)),
            ("rollouts", _rollouts(config)),
        )
        if text
    )


def matrix_product_rate(dtype: torch.dtype, size: int = 1024, repeats: int = 4) -> float:
    """FLOP/s of this machine's accelerator, or of one of its threads, on a large product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    square = torch.ones(size, size, dtype=dtype, device=device)
    square @ square  # the first one pays for what is loaded
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        (square @ square)[0, 0].item()  # waits for the accelerator
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _layout(config: RunConfig, world_size: int) -> str:
    model = config.model
    return (
        f"{world_size} ranks = tensor {model.tensor_model_parallel_size} × pipeline "
        f"{model.pipeline_model_parallel_size} × data {config.data_parallel_size(world_size)}"
    )


def _memory(config: RunConfig, world_size: int, data: TrainingData) -> str:
    probe = plan_probe(config, world_size, data)
    kept = probe.gradient_bytes if probe else 0
    return plan_memory(config, world_size, data.manifest.vocab_size, kept).in_words()


def _training(config: RunConfig) -> str:
    train = config.train
    samples = train.consumed_samples(train.train_iters)
    batches = f"{train.global_batch_size:,} samples"
    if not train.batch_sizes.is_constant:
        steps = train.batch_sizes.steps
        full = int(train.batch_sizes.batch_of(steps[-1][0]))
        batches = f"{steps[0][1]:,} to {batches} (full from iteration {full + 1:,} on)"
    return (
        f"{train.train_iters:,} iterations × {batches} × "
        f"{config.data.sequence_length:,} tokens = {samples * config.data.sequence_length:,} tokens"
    )


def _domains(config: RunConfig, data: TrainingData) -> str:
    tokens = sum(data.manifest.split(name, "train").tokens for name in data.names)
    return f"{len(data.names)} with {tokens:,} training tokens in {config.data.manifest}"


def _task(task: Task) -> str:
    return f"{task.name} ({task.note})" if task.note else task.name


_HOW = {
    "tikmix_d": "reset by TiKMiX-D",
    "tikmix_m": "reset by TiKMiX-M",
    "static": "kept (remix.policy static)",
}


def _mixture(config: RunConfig, data: TrainingData) -> str:
    boundaries = data.stage_boundaries(config)
    if data.planned is not None:
        later = len(data.planned.stages) - 1 - len(boundaries)
        return (
            f"{data.replays}; stages begin at iterations {_listed([0, *boundaries])}"
            + (f", and {later} more after the run's end" if later else "")
            + "; remix.interval_samples and data.initial_mixture are not used"
        )
    if not boundaries:
        return "the initial one throughout: no interval boundary before the end"
    text = (
        f"{_HOW[config.remix.policy]} at {len(boundaries)} boundaries, every "
        f"{config.interval_iters:,} iterations"
    )
    if not config.train.batch_sizes.is_constant:
        text += " of full batches"
    if config.remix.first_interval_samples not in (None, config.remix.interval_samples):
        text += f" from iteration {boundaries[0]:,} on"
    if config.decides:
        kept = [at for at in boundaries if config.outside_phase(at)]
        if kept:
            text += f"; but not at {len(kept)} of them: {config.outside_phase(kept[-1])}"
        if config.remix.mode == "advise":
            text += "; measured and logged only (remix.mode advise)"
    return text


def _listed(iterations: list[int]) -> str:
    shown = ", ".join(f"{iteration:,}" for iteration in iterations[:6])
    return shown if len(iterations) <= 6 else f"{shown}, … ({len(iterations)} in all)"


def _repetition(config: RunConfig, data: TrainingData) -> str:
    """Say which domains are repeated most, as far as the mixture is fixed before training."""
    train, reset = config.train, config.first_reset()
    end = train.train_iters if reset is None else reset
    samples_D = planned_samples(
        data.planned or data.initial_schedule(), train.consumed_samples(end)
    )
    epochs = [n / s.samples_per_epoch for n, s in zip(samples_D, data.streams, strict=True)]
    most = sorted(zip(epochs, data.names, strict=True), reverse=True)[:3]
    shown = ", ".join(f"{name} {passes:.3g}" for passes, name in most)
    until = "in the whole run" if reset is None else f"until the first reset, at iteration {end:,}"
    caps = config.remix.constraints.max_epochs
    limit = "" if caps is None else f"; at most {caps} (remix.constraints.max_epochs)"
    return f"epochs {until}: {shown}{limit}"


def _rollouts(config: RunConfig) -> str:
    """Say what short continuations cost at one boundary, in iterations of training."""
    if config.interval_iters is None or not config.decides or not config.needs_rollouts:
        return "none"
    parts = []
    remix, rollout, audit = config.remix, config.rollout, config.audit
    iterations = 0
    if remix.policy == "tikmix_m" and remix.measure == "rollout":
        iterations += remix.candidates * rollout.repetitions * rollout.iters
        parts.append(
            f"{remix.candidates} candidates × {rollout.repetitions} × {rollout.iters} iterations"
        )
    if audit.enabled:
        iterations += 2 * audit.repetitions * audit.iters
        parts.append(f"audit of 2 mixtures × {audit.repetitions} × {audit.iters} iterations")
    share = iterations / config.interval_iters
    return f"{' + '.join(parts)} = {iterations:,} iterations, {share:.1f} times an interval"


def _probe(config: RunConfig, world_size: int, data: TrainingData) -> str:
    plan = plan_probe(config, world_size, data)
    if plan is None:
        return "none"
    probe = config.probe
    text = f"{plan.in_words()}; curvature {probe.curvature}"
    rate = matrix_product_rate(torch.bfloat16 if config.model.bf16 else torch.float32)
    seconds = plan.tokens * plan.flops_per_token / (UTILISATION * rate * world_size)
    text += (
        f"; about {seconds:.2g} s, if each rank reaches {UTILISATION:.0%} of the {rate:.1e} "
        f"FLOP/s of a matrix product here (at the first boundary, from training's own speed)"
    )
    step = config.train.micro_batch_size
    if probe.data_parallel_mode == "sharded":
        step *= config.data_parallel_size(world_size)
    if probe.sub_batch_samples % step:
        text += (
            f"; part of that is padding: make probe.sub_batch_samples a multiple of {step} "
            f"(micro_batch_size × data-parallel ranks that share a sub-batch)"
        )
    wanted = plan.sub_batches * probe.sub_batch_samples
    small = [s.name for s in data.streams if s.samples_per_epoch < wanted]
    if small:
        text += (
            f"; {', '.join(small)} have fewer than {wanted} samples, so their probes repeat some"
        )
    return text


def _boundary(config: RunConfig, world_size: int, data: TrainingData) -> str:
    """Say what a boundary takes on the accelerator that is named; empty if none is."""
    plan = plan_probe(config, world_size, data)
    if plan is None or config.device_name is None:
        return ""
    trained = Trained.of(config, world_size, data.manifest.vocab_size)
    return boundary_cost(config.device_name, config, world_size, trained, plan).in_words()


_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Estimated bytes on the fullest rank, without those of the allocator, NCCL and CUDA itself."""

    parameters: int
    """Number of parameters of the whole model."""

    rank_parameters: int
    """Number of parameters on the fullest rank."""

    weights: int
    gradients: int

    optimizer: int
    """Main parameters where the weights are bf16, and Adam's two moments; this rank's share."""

    activations: int
    """Kept between forward and backward, for all micro-batches in flight."""

    kept_gradients: int
    """Kept by a probe, in addition to all the above; 0 without one."""

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
    """Return a count in short: `1.24 B` for 1,236 M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)


def plan_memory(
    config: RunConfig, world_size: int, vocab_size: int, kept_gradients: int
) -> MemoryPlan:
    """Estimate the memory of the fullest of `world_size` ranks.

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
    (arXiv 2205.05198), section 4, for these shapes, without hidden dropout's masks.

    The first pipeline stage holds as many micro-batches as there are stages, so all of the model's
    layers for one of them, and a little more where stages are interleaved. Only megatron-core's own
    attention keeps scores, and not with selective recomputation. A mask of documents is kept once a
    micro-batch: as bool, and for torch's attention in the model's type too.
    """
    model, batch = config.model, config.train.micro_batch_size
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    tokens, width = batch * config.data.sequence_length, 2 if model.bf16 else 4
    hidden, ffn = model.hidden_size, model.ffn_hidden_size or 0
    query = model.num_attention_heads * model.kv_channels
    keys = 2 * (model.num_query_groups or model.num_attention_heads) * model.kv_channels
    whole = 4 * hidden  # the inputs of two norms, of attention and of the MLP
    gated = 3 if model.bias_activation_fusion else 5  # both halves, then each once more, product
    rotated = query + keys // 2 if model.position_embedding_type == "rope" else 0  # copies
    split = 2 * query + keys + rotated + (gated if model.gated_linear_unit else 2) * ffn
    per_token = whole / (tp if model.sequence_parallel else 1) + split / tp
    flash = model.uses_transformer_engine or model.uses_torch_attention
    if not flash and model.recompute_granularity != "selective":
        scores = model.num_attention_heads * config.data.sequence_length / tp
        copies = 3.0 if model.bf16 and model.attention_softmax_in_fp32 else 1.0
        if model.attention_dropout:
            copies += 1 + 1 / width  # what is left of them, and a mask
        per_token += copies * scores  # after softmax
    recomputed = 0.0
    if model.recompute_granularity == "full":
        recomputed = per_token  # of the layer that is recomputed
        per_token = hidden / (tp if model.sequence_parallel else 1)
    in_flight: float = pp
    stages = model.virtual_pipeline_model_parallel_size
    if stages and pp > 1:
        in_flight += (pp - 1) / stages
    layers = model.num_layers / pp * in_flight
    mask = 0.0
    if config.data.reset_attention_mask:
        mask = in_flight * config.data.sequence_length * (1 + width * model.uses_torch_attention)
    logits = padded_vocab_size(vocab_size, model) / tp * (width + 4)  # and their float32 softmax
    embedded = in_flight * hidden / (tp if model.sequence_parallel else 1)
    kept = (layers * per_token + recomputed + embedded) * width + mask
    return int(tokens * (kept + (logits if pp == 1 else 0)))


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of tensors on `device`; without a GPU, that of this process.

    Counted since the process began, or `torch.cuda.reset_peak_memory_stats` was called.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
