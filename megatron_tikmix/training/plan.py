"""What a run is going to do and what its probe costs, in words, before it starts."""

import math

from megatron_tikmix.config import RunConfig
from megatron_tikmix.data.builder import TrainingData


def describe(config: RunConfig, world_size: int, data: TrainingData) -> str:
    """The plan, one line a subject."""
    return "\n".join(
        f"{subject:<12} {text}"
        for subject, text in (
            ("layout", _layout(config, world_size)),
            ("training", _training(config)),
            ("domains", _domains(config, data)),
            ("tasks", ", ".join(task.name for task in data.tasks)),
            ("mixture", _mixture(config)),
            ("probe", _probe(config, world_size, data)),
        )
    )


def probe_samples(config: RunConfig, world_size: int, data: TrainingData) -> int:
    """Samples of one probe: each costs a forward and a backward pass, as in training.

    Every pass fills the micro-batches of all data-parallel ranks, with padding where it must.
    """
    probe, model = config.probe, config.model
    step = config.train.micro_batch_size * config.data_parallel_size(world_size)
    if model.virtual_pipeline_model_parallel_size:
        step *= model.pipeline_model_parallel_size

    def filled(samples: int) -> int:
        return math.ceil(samples / step) * step

    of_tasks = sum(filled(min(probe.task_samples, t.decide.samples_per_epoch)) for t in data.tasks)
    return of_tasks + len(data.names) * probe.sub_batches * filled(probe.sub_batch_samples)


def _layout(config: RunConfig, world_size: int) -> str:
    model = config.model
    return (
        f"{world_size} ranks = tensor {model.tensor_model_parallel_size} × pipeline "
        f"{model.pipeline_model_parallel_size} × data {config.data_parallel_size(world_size)}"
    )


def _training(config: RunConfig) -> str:
    train = config.train
    samples = train.train_iters * train.global_batch_size
    return (
        f"{train.train_iters:,} iterations × {train.global_batch_size:,} samples × "
        f"{config.data.sequence_length:,} tokens = {samples * config.data.sequence_length:,} tokens"
    )


def _domains(config: RunConfig, data: TrainingData) -> str:
    tokens = sum(data.manifest.split(name, "train").tokens for name in data.names)
    return f"{len(data.names)} with {tokens:,} training tokens in {config.data.manifest}"


def _mixture(config: RunConfig) -> str:
    length, iters = config.interval_iters, config.train.train_iters
    if length is None or length >= iters:
        return "the initial one throughout: no interval boundary before the end"
    boundaries = (iters - 1) // length
    how = "reset by TiKMiX-D" if config.remix.policy == "tikmix_d" else "kept (remix.policy static)"
    return f"{how} at {boundaries} boundaries, every {length:,} iterations"


def _probe(config: RunConfig, world_size: int, data: TrainingData) -> str:
    length = config.interval_iters
    if length is None or config.remix.policy == "static":
        return "none"
    probe, samples = config.probe, probe_samples(config, world_size, data)
    share = samples / (samples + length * config.train.global_batch_size)
    text = (
        f"{len(data.names)} domains × {probe.sub_batches} sub-batches × "
        f"{probe.sub_batch_samples} samples + {len(data.tasks)} tasks = {samples:,} samples "
        f"({samples * config.data.sequence_length:,} tokens), {share:.0%} of the compute of an "
        f"interval with its probe; curvature {probe.curvature}"
    )
    step = config.train.micro_batch_size * config.data_parallel_size(world_size)
    if probe.sub_batch_samples % step:
        text += (
            f"; part of that is padding: make probe.sub_batch_samples a multiple of {step} "
            f"(micro_batch_size × data-parallel ranks)"
        )
    wanted = probe.sub_batches * probe.sub_batch_samples
    small = [s.name for s in data.streams if s.samples_per_epoch < wanted]
    if small:
        text += (
            f"; {', '.join(small)} have fewer than {wanted} samples, so their probes repeat some"
        )
    return text
