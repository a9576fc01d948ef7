"""Plans a probe before training: its cost, and whether that is within the limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_tikmix.config import MixtureSections, ProbeConfig, RunConfig
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import MIN_SUB_BATCHES
from megatron_tikmix.measure.curvature import CURVATURES
from megatron_tikmix.measure.flops import flops_per_token, parameters_per_rank


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """The cost of the probe at one boundary. Tokens count whether masked or not."""

    domains: int
    tasks: int

    own_gradients: int
    """Number of domains whose own gradient is kept like a task's: all with joint influence, else 0.
    """

    sub_batches: int
    """Sub-batches of each domain, lowered where `probe.max_overhead` demands it."""

    sub_batches_asked: int
    """Sub-batches of each domain as configured."""

    samples_of_tasks: int

    samples_of_sub_batch: int
    """Samples of one sub-batch of each domain, with padding, counted once for each pass."""

    samples_of_curvature: int

    least_samples_of_sub_batch: int
    """`samples_of_sub_batch` with just one micro-batch on each rank that takes part."""

    sequence_length: int
    interval_tokens: int
    max_overhead: float | None
    flops_per_token: float

    most_tokens: int | None
    """The most tokens to which `probe.precision` may let the probe grow; None without it."""

    gradient_bytes: int
    """The most bytes of validation gradients that a rank keeps."""

    mode: str

    @property
    def samples(self) -> int:
        of_domains = self.sub_batches * self.samples_of_sub_batch
        return self.samples_of_tasks + self.samples_of_curvature + of_domains

    @property
    def tokens(self) -> int:
        return self.samples * self.sequence_length

    @property
    def least_tokens(self) -> int:
        """Tokens of the smallest probe that gives standard errors."""
        samples = self.samples_of_tasks + MIN_SUB_BATCHES * self.least_samples_of_sub_batch
        return samples * self.sequence_length

    @property
    def overhead(self) -> float:
        """The probe's tokens divided by those of an interval."""
        return self.tokens / self.interval_tokens

    @property
    def affordable(self) -> bool:
        return self.max_overhead is None or self.overhead <= self.max_overhead

    def in_words(self) -> str:
        fewer = ""
        if self.sub_batches < self.sub_batches_asked:
            fewer = (
                f" (lowered from {self.sub_batches_asked} to stay within probe.max_overhead "
                f"{self.max_overhead:g})"
            )
        grows = ""
        if self.most_tokens is not None:
            grows = (
                f", growing to {self.most_tokens:,} at most where noise matters (probe.precision)"
            )
        own = f" + {self.own_gradients} own gradients of domains" if self.own_gradients else ""
        share = self.tokens / (self.tokens + self.interval_tokens)
        limit = "no limit" if self.max_overhead is None else f"limit {self.max_overhead:.0%}"
        return (
            f"{self.domains} domains × {self.sub_batches} sub-batches{fewer} + "
            f"{self.tasks} tasks{own} = {self.samples:,} samples "
            f"({self.tokens:,} tokens{grows}; at the least "
            f"{self.least_tokens:,}); {self.overhead:.1%} of an interval's tokens ({limit}), "
            f"{share:.1%} of the compute with the probe's; "
            f"{self.tokens * self.flops_per_token:.2g} FLOPs; validation gradients "
            f"{self.mode}, at most {self.gradient_bytes / 2**20:,.1f} MiB on a rank"
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The properties of model and layout on which a probe's cost depends.

    Attributes:
        microbatch_multiple: a pass must have a multiple of so many micro-batches: the pipeline
            size where stages are interleaved, else 1.
        parameters: their number on the fullest rank.
        flops_per_token: forward and backward, of the whole model.
    """

    data_parallel_size: int
    microbatch_multiple: int
    parameters: int
    flops_per_token: float

    @classmethod
    def of(cls, config: RunConfig, world_size: int, vocab_size: int) -> "Trained":
        """Return those of a run in our own loop, before the model is built."""
        model, length = config.model, config.data.sequence_length
        interleaved = model.virtual_pipeline_model_parallel_size is not None
        return cls(
            data_parallel_size=config.data_parallel_size(world_size),
            microbatch_multiple=model.pipeline_model_parallel_size if interleaved else 1,
            parameters=parameters_per_rank(model, vocab_size, length),
            flops_per_token=flops_per_token(model, vocab_size, length),
        )


@dataclass(frozen=True, kw_only=True)
class ProbeSizes:
    """The sizes of the data on which a probe's cost depends.

    Attributes:
        domains, tasks: numbers of domains, and of tasks that decide.
        samples: of each row that is kept (the tasks, and with joint influence the domains), how
            many samples it could be measured on.
    """

    domains: int
    tasks: int
    samples: Sequence[int]

    @classmethod
    def of(cls, data: TrainingData) -> "ProbeSizes":
        """Return those of the data of a run."""
        return cls(
            domains=len(data.names),
            tasks=len(data.deciding_tasks),
            samples=[task.decide.samples_per_epoch for task in data.probed_tasks],
        )


def plan_probe(config: RunConfig, world_size: int, data: TrainingData) -> ProbePlan | None:
    """Plan the probe before the model is built; return None if there is no probe.

    Raises:
        InputError: as :func:`plan_probe_of`.
    """
    trained = Trained.of(config, world_size, data.manifest.vocab_size)
    return plan_probe_of(trained, config, ProbeSizes.of(data))


def plan_probe_of(trained: Trained, config: MixtureSections, sizes: ProbeSizes) -> ProbePlan | None:
    """Plan the probe of a given model and layout; return None if there is no probe.

    Raises:
        InputError: even with 8 sub-batches the probe exceeds `probe.max_overhead`.
    """
    if not config.decides:
        return None
    plan = _as_configured(trained, config, sizes)
    while not plan.affordable and plan.sub_batches > MIN_SUB_BATCHES:
        plan = replace(plan, sub_batches=plan.sub_batches - 1)
    if plan.affordable:
        return plan
    assert plan.max_overhead is not None
    batch, interval = config.train.global_batch_size, config.remix.interval_samples
    enough = math.ceil(plan.samples / plan.max_overhead / batch) * batch
    raise InputError(
        f"probe.max_overhead: a probe of {plan.tokens:,} tokens (with {plan.sub_batches} "
        f"sub-batches, the fewest) is {plan.overhead:.3g} of an interval's "
        f"{plan.interval_tokens:,} tokens, and {plan.max_overhead:g} is allowed; lower "
        f"probe.sub_batch_samples ({config.probe.sub_batch_samples}) or probe.task_samples "
        f"({config.probe.task_samples}), raise remix.interval_samples from {interval} to "
        f"{enough}, or raise probe.max_overhead"
    )


def _as_configured(trained: Trained, config: MixtureSections, sizes: ProbeSizes) -> ProbePlan:
    probe, train = config.probe, config.train
    interval_samples = (config.interval_iters or 0) * train.global_batch_size
    ranks, length = trained.data_parallel_size, config.data.sequence_length
    D, V = sizes.domains, len(sizes.samples)
    replicated = probe.data_parallel_mode == "replicated"
    least = train.micro_batch_size * trained.microbatch_multiple
    step = least * (1 if replicated else ranks)  # a sub-batch is padded to a multiple of this
    groups = math.ceil(V / (probe.task_group_size or V))
    samples_of_tasks = sum(
        _filled(min(probe.task_samples, samples), least * ranks) for samples in sizes.samples
    )
    limits = [
        probe.max_tokens,
        None if probe.max_overhead is None else int(probe.max_overhead * interval_samples * length),
    ]
    known = [limit for limit in limits if limit is not None]
    return ProbePlan(
        most_tokens=min(known) if probe.precision is not None else None,
        domains=D,
        tasks=sizes.tasks,
        own_gradients=V - sizes.tasks,
        sub_batches=probe.sub_batches,
        sub_batches_asked=probe.sub_batches,
        samples_of_tasks=samples_of_tasks,
        samples_of_sub_batch=D * groups * _filled(probe.sub_batch_samples, step),
        samples_of_curvature=(
            D * _filled(probe.sub_batch_samples, least * ranks)
            if CURVATURES[probe.curvature].passes_domains
            else 0
        ),
        least_samples_of_sub_batch=D * groups * step,
        sequence_length=length,
        interval_tokens=interval_samples * length,
        max_overhead=probe.max_overhead,
        flops_per_token=trained.flops_per_token,
        gradient_bytes=kept_gradient_bytes(probe, V, trained.parameters, ranks),
        mode=probe.data_parallel_mode,
    )


def kept_gradient_bytes(
    probe: ProbeConfig, rows: int, parameters: int, data_parallel_size: int
) -> int:
    """Return the bytes of validation gradients that a rank keeps.

    Args:
        rows: gradients, of tasks and with joint influence of domains.
        parameters: their number on the rank.
    """
    of_slices = rows * parameters / data_parallel_size
    group = probe.task_group_size or rows
    if probe.data_parallel_mode == "sharded":
        kept = of_slices
    else:
        kept = min(group, rows) * parameters + (of_slices if group < rows else 0)
    return int(kept * (2 if probe.gradient_dtype == "bf16" else 4))


def _filled(samples: int, step: int) -> int:
    """Round `samples` up to full micro-batches on every rank that takes part."""
    return math.ceil(samples / step) * step
