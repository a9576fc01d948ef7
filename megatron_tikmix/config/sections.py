"""Sections `data`, `tasks`, `evaluate`, `probe`, `train`, `scheduler` and `checkpoint`.

The sections that concern the mixture, whoever trains, are :class:`MixtureSections`.
"""

import fnmatch
import math
import re
from dataclasses import dataclass, field
from typing import Literal

import torch

from megatron_tikmix.config.ranges import (
    AtLeast8,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_ranges,
)
from megatron_tikmix.config.remix import AuditConfig, RemixConfig, RolloutConfig
from megatron_tikmix.errors import InputError, require
from megatron_tikmix.mixture.batch_sizes import BatchSizes


@dataclass(kw_only=True)
class DataConfig:
    """Training domains."""

    manifest: str
    """The domain manifest (YAML) that `tikmix preprocess` wrote."""

    sequence_length: PositiveInt = 1024
    """Tokens of one sample."""

    domains: list[str] | None = None
    """Train on these domains of the manifest only (default: all of them)."""

    initial_mixture: (
        Literal["uniform", "proportional", "temperature", "unimax"] | dict[str, float]
    ) = "proportional"
    """Mixture of the first interval, and of the whole run with remix.policy static: `uniform`,
    `proportional` to training tokens, `temperature` (proportional to tokens^(1/temperature)),
    `unimax` (as uniform as unimax_epochs over the whole run allow), or weights by domain name."""

    temperature: PositiveFloat = 2.0
    """`initial_mixture: temperature`: 1 is proportional, larger is nearer to uniform."""

    unimax_epochs: PositiveFloat = 4.0
    """`initial_mixture: unimax`: the most passes over a domain in the whole run."""

    num_workers: NonNegativeInt | None = None
    """Data-loading worker processes of each rank. None: 2 where there is a GPU, and none without,
    where reading samples takes a small part of a step."""

    path_to_cache: str | None = None
    """Where the indices of large domains' epochs are kept, for all ranks and later runs; it must be
    a folder that all nodes see. None: RUN_DIR/cache. Small domains have none on disk."""

    reset_attention_mask: bool = False
    """Intra-document masking: no token attends to an earlier document of its sample."""

    reset_position_ids: bool = False
    """Count positions anew in every document of a sample (matters to position_embedding_type
    learned_absolute only)."""

    eod_mask_loss: bool = False
    """Leave out the loss where the input is an end-of-document token."""

    def __post_init__(self) -> None:
        check_ranges("data", self)
        require(self.domains != [], "data.domains", "must name a domain, or be left out for all")
        if self.num_workers is None:
            self.num_workers = 2 if torch.cuda.is_available() else 0


@dataclass(kw_only=True)
class TaskConfig:
    """A validation task: give one of `domain`, `prefix` and `prompts`."""

    domain: str | None = None
    """The domain whose `validation` split is measured."""

    prefix: str | None = None
    """PREFIX.bin and PREFIX.idx are measured: further held-out text, made with the manifest's
    tokenizer."""

    prompts: str | None = None
    """A JSONL file (plain, .gz, .bz2, .xz or .zst) of prompts and completions, of which the
    completions are measured. Tokenised at the start with the manifest's tokenizer."""

    prompt_field: str = "prompt"
    """`prompts`: the field that holds the prompt."""

    completion_field: str = "completion"
    """`prompts`: the field that holds the completion."""

    weight: float = 1.0
    """What this task counts for in the decision, relative to the others."""

    decides: bool = True
    """False: the task is measured and reported, and no mixture is decided on it."""

    def check(self, name: str) -> None:
        """Refuse a weight out of range, and other than one of the fields that give the task."""
        # No PositiveFloat: the parser would not say of which task.
        require(0 < self.weight < math.inf, f"tasks.{name}.weight", "must be positive")
        kinds = [kind for kind in ("domain", "prefix", "prompts") if getattr(self, kind)]
        require(
            len(kinds) == 1,
            f"tasks.{name}",
            f"must have one of domain, prefix and prompts, and has {' and '.join(kinds) or 'none'}",
        )


@dataclass(kw_only=True)
class EvaluateConfig:
    """Validation loss at every boundary and at the end, on items that do not decide."""

    task_samples: PositiveInt = 64
    """At most so many samples of each task are measured."""

    def __post_init__(self) -> None:
        check_ranges("evaluate", self)


@dataclass(kw_only=True)
class ParametersConfig:
    """Which parameters influence is measured on, by patterns on their names in the whole model.

    Names are GPTModel's, layers counted from 0 over all pipeline stages:
    `embedding.word_embeddings.weight`, `decoder.layers.3.mlp.linear_fc1.weight`. In a pattern `*`
    stands for any characters, dots too.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    """Measure on parameters that match one of these."""

    exclude: list[str] = field(default_factory=list)
    """But not on parameters that match one of these: `embedding.*`, `output_layer.*`."""

    def __post_init__(self) -> None:
        require(bool(self.include), "probe.parameters.include", "must have a pattern")

    def selects(self, name: str) -> bool:
        """Whether influence is measured on the parameter of this name."""
        included, excluded = (
            any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            for patterns in (self.include, self.exclude)
        )
        return included and not excluded


@dataclass(kw_only=True)
class ProbeConfig:
    """The influence probe at each boundary."""

    data_parallel_mode: Literal["sharded", "replicated"] = "sharded"
    """`sharded`: every sub-batch is spread over the data-parallel ranks and its gradient
    reduce-scattered, as in training; each rank keeps its slice of the validation gradients.
    `replicated`: each rank keeps them whole, takes sub-batches of its own, and no gradient of a
    domain is sent at all. Both give the same matrix."""

    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type in which validation gradients are kept; inner products are summed in float64."""

    task_group_size: PositiveInt | None = None
    """`replicated` only: keep the whole gradients of so many tasks at a time, and pass through
    the domains again for each group. None: all tasks at once."""

    parameters: ParametersConfig = field(default_factory=ParametersConfig)

    curvature: Literal["adam", "squared_gradients", "identity"] = "adam"
    """Inverse curvature: `adam` (the optimizer's damped second moment; before its first step
    `squared_gradients`), `squared_gradients` (the probe's own, of one sub-batch of each domain)
    or `identity`."""

    damping: PositiveFloat = 0.1
    """Damping of `adam` and `squared_gradients`, relative to the mean of sqrt(second moment)."""

    sub_batches: AtLeast8 = 8
    """Sub-batches of each domain; standard errors come from their spread."""

    sub_batch_samples: PositiveInt = 8
    """Samples of one sub-batch, over all data-parallel ranks."""

    task_samples: PositiveInt = 64
    """At most so many samples of each task decide (the others report); with remix.influence joint
    also of each domain's own gradient."""

    max_overhead: PositiveFloat | None = 0.25
    """A probe may take at most so many tokens, relative to those of an interval: sub_batches is
    lowered to fit, and what cannot fit is refused before training. None: no limit."""

    precision: OpenUnitInterval | None = None
    """Adaptive budget: add sub-batches where they matter, beyond `sub_batches`, until noise moves
    the mixture solved by no more than this in total variation, and a fresh batch confirms it.
    None: `sub_batches` of each domain, and no more."""

    max_tokens: PositiveInt | None = None
    """`precision` only: the most tokens of one probe. None: what max_overhead leaves."""

    seed: int = 4321
    """Seed of the probe's own sample stream, apart from training's."""

    def __post_init__(self) -> None:
        check_ranges("probe", self)
        require(
            self.task_group_size is None or self.data_parallel_mode == "replicated",
            "probe.task_group_size",
            "bounds the memory of data_parallel_mode replicated only; leave it out",
        )
        require(
            self.max_tokens is None or self.precision is not None,
            "probe.max_tokens",
            "goes with probe.precision",
        )
        require(
            self.precision is None or (self.max_tokens or self.max_overhead) is not None,
            "probe.precision",
            "needs a limit: probe.max_tokens or probe.max_overhead",
        )


MAY_CHANGE = (
    "seed",
    "domains",
    "tokens",
    "files",
    "tokenizer",
    "data.reset_position_ids",
    "data.reset_attention_mask",
    "data.eod_mask_loss",
)
"""Settings that may differ from those of a resumed checkpoint, if `allow_changed` names them."""


@dataclass(kw_only=True)
class TrainConfig:
    """How much to train, and in which batches."""

    train_iters: PositiveInt
    """Optimizer steps of the whole run."""

    micro_batch_size: PositiveInt = 1
    """Samples of one forward-backward pass on one data-parallel rank."""

    global_batch_size: PositiveInt = 8
    """Samples of one optimizer step, over all data-parallel ranks."""

    rampup_batch_size: list[int] | None = None
    """Megatron's batch-size ramp-up, [START, INCREMENT, SAMPLES]: the first global batches have
    START samples, and in equal parts of SAMPLES samples they grow by INCREMENT to
    global_batch_size."""

    log_interval: PositiveInt = 10
    """Write a row of metrics.jsonl and TensorBoard every so many iterations."""

    exit_interval: PositiveInt | None = None
    """Save and end the run at iterations divisible by this, with exit code 0."""

    exit_duration_in_mins: PositiveFloat | None = None
    """Save and end the run, with exit code 0, after the step in which so many minutes are over."""

    max_skipped_iterations: PositiveInt = 3
    """An update whose gradient is not finite is skipped and counted, as in Megatron; the run ends
    with an error after so many in a row."""

    loss_spike_factor: PositiveFloat | None = 1.5
    """Warn of logged losses of more than so many times what the domains of their samples had of
    late, and count them; null: do not. They are trained on all the same."""

    def __post_init__(self) -> None:
        check_ranges("train", self)
        ramp, size = self.rampup_batch_size, self.global_batch_size
        if ramp is None:
            self._batch_sizes = BatchSizes.constant(size)
            return
        require(len(ramp) == 3, "train.rampup_batch_size", "must be [START, INCREMENT, SAMPLES]")
        start, increment, samples = ramp
        try:
            self._batch_sizes = BatchSizes.ramp_up(start, increment, samples, size)
        except InputError as error:
            raise InputError(f"train.rampup_batch_size: {error}") from None

    @property
    def batch_sizes(self) -> BatchSizes:
        """Samples of each global batch."""
        return self._batch_sizes

    def consumed_samples(self, iteration: int) -> int:
        """Samples of the first `iteration` iterations."""
        return int(self._batch_sizes.samples_before(iteration))


@dataclass(kw_only=True)
class SchedulerConfig:
    """Learning-rate schedule (megatron-core's OptimizerParamScheduler).

    The peak and the floor are `optimizer.lr` and `optimizer.min_lr`.
    """

    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay."""

    lr_warmup_iters: NonNegativeInt = 0
    """Iterations of linear warm-up from 0."""

    lr_decay_iters: PositiveInt | None = None
    """Iterations until the floor is reached (default: the whole run)."""

    lr_wsd_decay_iters: PositiveInt | None = None
    """WSD only: length of the final decay, in iterations."""

    def __post_init__(self) -> None:
        check_ranges("scheduler", self)
        require(
            self.lr_decay_style != "WSD" or self.lr_wsd_decay_iters is not None,
            "scheduler.lr_wsd_decay_iters",
            "must be given with lr_decay_style WSD",
        )


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints under RUN_DIR/checkpoints; a run started again in its directory resumes."""

    save_interval: PositiveInt | None = None
    """Iterations between checkpoints, besides one after every boundary and one at the end."""

    keep: PositiveInt = 2
    """How many of the newest checkpoints to keep; older ones are deleted."""

    keep_every: PositiveInt | None = None
    """Checkpoints of iterations divisible by this are kept besides, for good."""

    async_save: bool = False
    """Write checkpoints in a process of their own while training goes on; the last one of a run is
    waited for. It needs the host memory of what this rank writes."""

    allow_changed: list[str] = field(default_factory=list)
    """What may differ from the checkpoint that is resumed: some of seed, domains, tokens, files,
    tokenizer, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss. Domains can
    only be added: a stage begins where the run is resumed, in which each has its share of
    data.initial_mixture. With another seed or other tokens a domain's samples come in another
    order: some are repeated, some left out."""

    def __post_init__(self) -> None:
        check_ranges("checkpoint", self)
        unknown = [name for name in self.allow_changed if name not in MAY_CHANGE]
        require(not unknown, "checkpoint.allow_changed", f"must be of {', '.join(MAY_CHANGE)}")


class MixtureSections:
    """The sections that data, probe, decision and rollouts read, and what follows from them.

    :class:`~megatron_tikmix.config.RunConfig` has these fields among others;
    :class:`HostedConfig` has no more.
    """

    data: DataConfig
    tasks: dict[str, TaskConfig]
    train: TrainConfig
    scheduler: SchedulerConfig
    remix: RemixConfig
    probe: ProbeConfig
    rollout: RolloutConfig
    audit: AuditConfig
    run_dir: str
    seed: Seed

    def check_sections(self) -> None:
        """Refuse sections that do not fit together, and settle what is None in `remix`.

        Raises:
            InputError: names the field and the remedy.
        """
        check_ranges("", self)
        require(bool(self.tasks), "tasks", "must name at least one validation task")
        require(
            bool(self.deciding_tasks) or self.remix.policy in ("static", "schedule"),
            "tasks",
            "must have at least one that decides; all have `decides: false`",
        )
        for name in self.tasks:
            require(
                re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None,
                f"tasks.{name}",
                "must be named with letters, digits, '_', '.' and '-' only",
            )
            self.tasks[name].check(name)
            require(
                self.remix.preset != "paper" or self.tasks[name].weight == 1,
                f"tasks.{name}.weight",
                "cannot be set with remix.preset paper, which takes the raw sum over tasks",
            )
        require(
            self.audit.enabled or not self.remix.require_audit,
            "remix.require_audit",
            "needs audit.enabled true",
        )
        require(bool(self.run_dir), "run_dir", "must name a folder")
        self.remix = self.remix.settled()

    @property
    def decides(self) -> bool:
        """Whether mixtures are decided by influence at interval boundaries."""
        follows = self.remix.policy in ("static", "schedule")
        return not follows and self.remix.interval_samples is not None

    @property
    def interval_iters(self) -> int | None:
        """Iterations of one interval, once batches are full; None without intervals."""
        samples = self.remix.interval_samples
        return None if samples is None else samples // self.train.global_batch_size

    @property
    def boundaries(self) -> list[int]:
        """The iterations after which an interval ends; none at the end of training."""
        length, sizes = self.remix.interval_samples, self.train.batch_sizes
        if length is None:
            return []
        first = self.remix.first_interval_samples or length
        total = self.train.consumed_samples(self.train.train_iters)
        ends = (sizes.end_from(reached) for reached in range(first, total, length))
        return [int(sizes.batch_of(end)) for end in ends if end < total]

    def first_reset(self) -> int | None:
        """The first iteration at which the mixture may be reset; None if there is none."""
        if not self.decides or self.remix.mode == "advise":
            return None
        return next((at for at in self.boundaries if not self.outside_phase(at)), None)

    @property
    def deciding_tasks(self) -> dict[str, TaskConfig]:
        """The tasks that the mixture is decided on."""
        return {name: task for name, task in self.tasks.items() if task.decides}

    def outside_phase(self, iteration: int) -> str:
        """Return why there is no reset at this iteration, in words; empty if there is one."""
        remix, iters = self.remix, self.train.train_iters

        def at(bound: int | float) -> int:
            return bound if isinstance(bound, int) else round(bound * iters)

        if iteration < at(remix.start):
            return f"resets begin at iteration {at(remix.start)} (remix.start)"
        if remix.stop is not None and iteration > at(remix.stop):
            return f"resets ended at iteration {at(remix.stop)} (remix.stop)"
        decay = self.scheduler.lr_wsd_decay_iters
        if self.scheduler.lr_decay_style == "WSD" and decay is not None and not remix.in_lr_decay:
            first = (self.scheduler.lr_decay_iters or iters) - decay
            if iteration >= first:
                return (
                    f"the learning rate decays from iteration {first} on (remix.in_lr_decay false)"
                )
        return ""

    @property
    def needs_rollouts(self) -> bool:
        """Whether anything is measured by short continuations of training."""
        by_rollout = self.remix.policy == "tikmix_m" and self.remix.measure == "rollout"
        return by_rollout or self.audit.enabled


@dataclass(kw_only=True)
class HostedConfig(MixtureSections):
    """The configuration of a Remixer in a training loop that is not ours.

    ::

        HostedConfig(
            data=DataConfig(manifest="data/domains.yaml", sequence_length=4096),
            tasks={"code": TaskConfig(domain="python_code")},
            train=TrainConfig(train_iters=100_000, micro_batch_size=2, global_batch_size=512),
            remix=RemixConfig(interval_samples=512 * 10_000),
        )
    """

    data: DataConfig
    tasks: dict[str, TaskConfig]
    """Validation tasks by name."""

    train: TrainConfig
    """As the loop trains: iterations, and sizes of its batches."""

    remix: RemixConfig = field(default_factory=RemixConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)

    scheduler: SchedulerConfig = field(
        default_factory=lambda: SchedulerConfig(lr_decay_style="constant")
    )
    """The loop's learning-rate schedule; read only for where a WSD schedule's final decay begins,
    in which there is no reset (`remix.in_lr_decay`)."""

    run_dir: str = "runs/hosted"
    """The run's folder: its ledger, and the indices of large domains (`data.path_to_cache`)."""

    seed: Seed = 1234
    """Seed of the sample order."""

    def __post_init__(self) -> None:
        self.check_sections()
