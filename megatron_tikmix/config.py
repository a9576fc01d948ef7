"""One run, as nested dataclasses: what YAML files and ``--section.field value`` fill in.

Sections ``model``, ``optimizer`` and ``ddp`` are megatron-core's own configuration classes;
every field they have can be set. The other sections are declared here. A field's docstring
is what ``--help`` shows.
"""

import difflib
import fnmatch
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import SUPPRESS, ArgumentError, ArgumentParser, set_parsing_settings
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import BatchSizes, MixtureConstraints


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
        self.params_dtype = self.pipeline_dtype = torch.bfloat16 if self.bf16 else torch.float32
        # With overlap_p2p_comm an output would be freed before its send is waited for.
        self.deallocate_pipeline_outputs = False
        if self.virtual_pipeline_model_parallel_size:
            # Interleaved without overlap, two stages mix up their messages: the losses are wrong,
            # and nothing says so. Overlapping is also what Megatron does unless told otherwise.
            self.overlap_p2p_comm, self.batch_p2p_comm = True, False
        super().__post_init__()


@dataclass(kw_only=True)
class DataConfig:
    """Training domains."""

    manifest: str
    """The domain manifest (YAML) that tools/preprocess_data.py wrote."""

    sequence_length: int = 1024
    """Tokens of one sample."""

    domains: list[str] | None = None
    """Train on these domains of the manifest only (default: all of them)."""

    initial_mixture: (
        Literal["uniform", "proportional", "temperature", "unimax"] | dict[str, float]
    ) = "proportional"
    """Mixture of the first interval, and of the whole run with remix.policy static: `uniform`,
    `proportional` to training tokens, `temperature` (proportional to tokens^(1/temperature)),
    `unimax` (as uniform as unimax_epochs over the whole run allow), or weights by domain name."""

    temperature: float = 2.0
    """`initial_mixture: temperature`: 1 is proportional, larger is nearer to uniform."""

    unimax_epochs: float = 4.0
    """`initial_mixture: unimax`: the most passes over a domain in the whole run."""

    num_workers: int | None = None
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
        require(self.sequence_length > 0, "data.sequence_length", "must be positive")
        require(self.domains != [], "data.domains", "must name a domain, or be left out for all")
        if self.num_workers is None:
            self.num_workers = 2 if torch.cuda.is_available() else 0
        require(self.num_workers >= 0, "data.num_workers", "must not be negative")


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
        """Refuse a task that is given by more or less than one of its three fields."""
        kinds = [kind for kind in ("domain", "prefix", "prompts") if getattr(self, kind)]
        require(
            len(kinds) == 1,
            f"tasks.{name}",
            f"must have one of domain, prefix and prompts, and has {' and '.join(kinds) or 'none'}",
        )


@dataclass(kw_only=True)
class TrainConfig:
    """How much to train, and in which batches."""

    train_iters: int
    """Optimizer steps of the whole run."""

    micro_batch_size: int = 1
    """Samples of one forward-backward pass on one data-parallel rank."""

    global_batch_size: int = 8
    """Samples of one optimizer step, over all data-parallel ranks."""

    rampup_batch_size: list[int] | None = None
    """Megatron's batch-size ramp-up, [START, INCREMENT, SAMPLES]: the first global batches have
    START samples, and in equal parts of SAMPLES samples they grow by INCREMENT to
    global_batch_size."""

    log_interval: int = 10
    """Write a row of metrics.jsonl and TensorBoard every so many iterations."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "micro_batch_size", "global_batch_size", "log_interval"):
            require(getattr(self, name) > 0, f"train.{name}", "must be positive")
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

    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from 0."""

    lr_decay_iters: int | None = None
    """Iterations until the floor is reached (default: the whole run)."""

    lr_wsd_decay_iters: int | None = None
    """WSD only: length of the final decay, in iterations."""

    def __post_init__(self) -> None:
        require(self.lr_warmup_iters >= 0, "scheduler.lr_warmup_iters", "must not be negative")
        require(
            self.lr_decay_style != "WSD" or self.lr_wsd_decay_iters is not None,
            "scheduler.lr_wsd_decay_iters",
            "must be given with lr_decay_style WSD",
        )


@dataclass(frozen=True, kw_only=True)
class ConstraintsConfig(MixtureConstraints):
    """Limits that every mixture decided at a boundary must respect."""

    max_total_variation: float | None = None
    """Largest change per reset, ½ Σ_j |w_j - prior_j|; None: no limit."""

    pareto: bool = False
    """No task may gain less than under the mixture in force: S w ≥ S w_prior in every row. Always
    so with remix.preset paper."""

    max_epochs: float | dict[str, float] | None = None
    """Passes over a domain's training tokens, counted over the whole run, that no reset may plan
    to exceed: one for all domains, or by name. It becomes an upper bound on the weight, from the
    tokens that are left and the length of the next interval."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except InputError as error:
            raise InputError(f"remix.constraints.{error}") from None
        for name in ("confidence", "pareto_slack"):
            require(
                self.pareto or not getattr(self, name),
                f"remix.constraints.{name}",
                "is about Pareto: set remix.constraints.pareto true, or leave it out",
            )
        caps = self.max_epochs
        for value in caps.values() if isinstance(caps, dict) else [caps]:
            require(
                value is None or (math.isfinite(value) and value > 0),
                "remix.constraints.max_epochs",
                f"({value}) must be above 0",
            )


@dataclass(kw_only=True)
class RemixConfig:
    """When and how the mixture is reset."""

    policy: Literal["tikmix_d", "tikmix_m", "static", "schedule"] = "tikmix_d"
    """`tikmix_d` solves for the mixture at every boundary, `tikmix_m` goes on from its answer with
    a surrogate fitted to measured candidates; `static` keeps the initial one; `schedule` follows
    the stages of the file or run named by `schedule`."""

    interval_samples: int | None = None
    """Samples of one interval, a whole number of global batches. None: no boundary at all. During a
    batch-size ramp-up an interval ends with the batch that reaches its end."""

    schedule: str | None = None
    """`policy: schedule`: a YAML or JSON list of stages (`start_sample`, `weights`), or the run_dir
    or ledger (mixture.jsonl) of a run to follow. It replaces interval_samples and
    data.initial_mixture."""

    first_interval_samples: int | None = None
    """Samples of the first interval, on the initial mixture, where it is to be shorter or longer
    than the others: what is trained on a bad mixture is lost. None: interval_samples."""

    start: int | float = 0
    """No reset before this iteration, or before this share of training (a number with a point, up
    to 1.0)."""

    stop: int | float | None = None
    """No reset after this iteration, or after this share of training. None: no limit."""

    in_lr_decay: bool = False
    """Also reset during the final learning-rate decay of a WSD schedule."""

    mode: Literal["apply", "advise"] = "apply"
    """`advise`: measure and solve at each boundary, log the answer, and keep the mixture."""

    alpha: float = 1.0
    """Weight of uniformity over tasks, std(gain)."""

    beta: float = 1.0
    """Weight of the gain summed over tasks."""

    gamma: float = 1.0
    """Weight of the mixture's diversity."""

    preset: Literal["paper"] | None = None
    """`paper`: as published: the raw sum over tasks, and influence, gain, diversity_reference and
    smoothing at the values given there, and Pareto."""

    influence: Literal["joint", "marginal"] | None = None
    """`marginal`: of each domain by itself, to first order, as published. `joint`: each task's
    gradient is fitted by those of all domains together, so that near-duplicates share their credit
    and what only has the right words gets little. It keeps a gradient of each domain too: the
    memory and passes of as many more tasks. None: joint; marginal with preset paper."""

    gain: Literal["linear", "log"] | None = None
    """`linear` in a mixture's influence on a task, or its `log`arithm, since gains saturate: what a
    task gets much of already is worth less to it. None: log; linear with preset paper."""

    diversity_reference: Literal["uniform", "proportional", "prior"] | None = None
    """What diversity is measured from: `uniform` (entropy), `proportional` to training tokens, or
    `prior`, the mixture in force; the last two as KL divergence. None: prior, so that answers
    accumulate over boundaries and noise averages out; uniform with preset paper."""

    smoothing: float | None = None
    """Weight of former boundaries in an exponential average of influence, 0 (none) to below 1.
    None: 0.5; 0 with preset paper."""

    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)

    measure: Literal["gradient", "rollout"] = "rollout"
    """tikmix_m: how candidates are measured: `rollout`, by training on each for a while (section
    `rollout`), or `gradient`, by their influence, which costs nothing more."""

    candidates: int = 48
    """tikmix_m: how many candidate mixtures are measured."""

    require_audit: bool = False
    """Keep the mixture in force where the audit contradicts the prediction (section `audit`)."""

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            require(
                math.isfinite(value) and value >= 0,
                f"remix.{name}",
                "must be finite, and not negative",
            )
        require(
            self.preset != "paper" or self.gain in (None, "linear"),
            "remix.gain",
            "is linear with remix.preset paper",
        )
        require(
            (self.policy == "schedule") == (self.schedule is not None),
            "remix.schedule",
            "goes with remix.policy schedule, and that needs it",
        )
        require(0 <= (self.smoothing or 0) < 1, "remix.smoothing", "must be from 0 to below 1")
        require(self.candidates >= 16, "remix.candidates", "must be at least 16")
        for name in ("start", "stop"):
            value = getattr(self, name)
            require(
                value is None or (value >= 0 and (isinstance(value, int) or value <= 1)),
                f"remix.{name}",
                f"({value}) must be an iteration (a whole number), or a share of training from "
                f"0.0 to 1.0",
            )

    def settled(self) -> "RemixConfig":
        """The same, with what is None given by the preset."""
        paper = self.preset == "paper"
        given: dict[str, Any] = {
            "influence": "marginal" if paper else "joint",
            "gain": "linear" if paper else "log",
            "diversity_reference": "uniform" if paper else "prior",
            "smoothing": 0.0 if paper else 0.5,
        }
        chosen = {name: value for name, value in given.items() if getattr(self, name) is None}
        if paper and not self.constraints.pareto:
            chosen["constraints"] = replace(self.constraints, pareto=True)
        return replace(self, **chosen)


@dataclass(kw_only=True)
class RolloutConfig:
    """Short real continuations of training, undone afterwards, that measure a candidate mixture."""

    iters: int = 40
    """Optimizer steps of each."""

    repetitions: int = 1
    """How often each candidate is measured, on fresh samples."""

    def __post_init__(self) -> None:
        for name in ("iters", "repetitions"):
            require(getattr(self, name) > 0, f"rollout.{name}", "must be positive")


@dataclass(kw_only=True)
class AuditConfig:
    """Rollouts of the old and the new mixture at a boundary, against what influence predicted."""

    enabled: bool = False
    """Make one whenever the mixture is to change."""

    iters: int = 40
    """Optimizer steps of each rollout."""

    repetitions: int = 4
    """Pairs of rollouts, each pair on fresh samples."""

    confidence: float = 0.95
    """Of the interval that a difference must be outside of to count."""

    def __post_init__(self) -> None:
        require(self.iters > 0, "audit.iters", "must be positive")
        require(self.repetitions >= 4, "audit.repetitions", "must be at least 4, for an interval")
        require(0 < self.confidence < 1, "audit.confidence", "must be between 0 and 1")


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

    task_group_size: int | None = None
    """`replicated` only: keep the whole gradients of so many tasks at a time, and pass through
    the domains again for each group. None: all tasks at once."""

    parameters: ParametersConfig = field(default_factory=ParametersConfig)

    curvature: Literal["adam", "squared_gradients", "identity"] = "adam"
    """Inverse curvature: `adam` (the optimizer's damped second moment; before its first step
    `squared_gradients`), `squared_gradients` (the probe's own, of one sub-batch of each domain)
    or `identity`."""

    damping: float = 0.1
    """Damping of `adam` and `squared_gradients`, relative to the mean of sqrt(second moment)."""

    sub_batches: int = 8
    """Sub-batches of each domain; standard errors come from their spread."""

    sub_batch_samples: int = 8
    """Samples of one sub-batch, over all data-parallel ranks."""

    task_samples: int = 64
    """At most so many samples of each task decide (the others report); with remix.influence joint
    also of each domain's own gradient."""

    max_overhead: float | None = 0.25
    """A probe may take at most so many tokens, relative to those of an interval: sub_batches is
    lowered to fit, and what cannot fit is refused before training. None: no limit."""

    precision: float | None = None
    """Adaptive budget: add sub-batches where they matter, beyond `sub_batches`, until noise moves
    the mixture solved by no more than this in total variation, and a fresh batch confirms it.
    None: `sub_batches` of each domain, and no more."""

    max_tokens: int | None = None
    """`precision` only: the most tokens of one probe. None: what max_overhead leaves."""

    seed: int = 4321
    """Seed of the probe's own sample stream, apart from training's."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.damping) and self.damping > 0, "probe.damping", "must be positive"
        )
        require(
            self.task_group_size is None or self.task_group_size > 0,
            "probe.task_group_size",
            "must be positive",
        )
        require(
            self.task_group_size is None or self.data_parallel_mode == "replicated",
            "probe.task_group_size",
            "bounds the memory of data_parallel_mode replicated only; leave it out",
        )
        require(self.sub_batches >= 8, "probe.sub_batches", "must be at least 8 for honest errors")
        require(
            self.precision is None or 0 < self.precision < 1,
            "probe.precision",
            "must be between 0 and 1",
        )
        require(
            self.max_tokens is None or (self.max_tokens > 0 and self.precision is not None),
            "probe.max_tokens",
            "must be positive, and goes with probe.precision",
        )
        require(
            self.precision is None or (self.max_tokens or self.max_overhead) is not None,
            "probe.precision",
            "needs a limit: probe.max_tokens or probe.max_overhead",
        )
        for name in ("sub_batch_samples", "task_samples"):
            require(getattr(self, name) > 0, f"probe.{name}", "must be positive")
        require(
            self.max_overhead is None or self.max_overhead > 0,
            "probe.max_overhead",
            "must be positive, or null for no limit",
        )


@dataclass(kw_only=True)
class EvaluateConfig:
    """Validation loss at every boundary and at the end, on items that do not decide."""

    task_samples: int = 64
    """At most so many samples of each task are measured."""

    def __post_init__(self) -> None:
        require(self.task_samples > 0, "evaluate.task_samples", "must be positive")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints under RUN_DIR/checkpoints; a run started again in its directory resumes."""

    save_interval: int | None = None
    """Iterations between checkpoints, besides one after every boundary and one at the end."""

    keep: int = 2
    """How many checkpoints to keep; older ones are deleted."""

    def __post_init__(self) -> None:
        require(
            self.save_interval is None or self.save_interval > 0,
            "checkpoint.save_interval",
            "must be positive",
        )
        require(self.keep > 0, "checkpoint.keep", "must be positive")


@dataclass(kw_only=True)
class RunConfig:
    """One pretraining run."""

    model: GPTConfig
    """megatron-core's TransformerConfig (parallel sizes included) and GPTModel's arguments."""

    data: DataConfig
    tasks: dict[str, TaskConfig]
    """Validation tasks by name."""

    train: TrainConfig

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """megatron-core's OptimizerConfig; the distributed optimizer is always used."""

    ddp: DistributedDataParallelConfig = field(default_factory=DistributedDataParallelConfig)
    """megatron-core's DistributedDataParallelConfig."""

    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    remix: RemixConfig = field(default_factory=RemixConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    run_dir: str = "runs/run"
    """Where everything of the run is written."""

    seed: int = 1234
    """Seed of parameters, dropout and sample order."""

    timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the job."""

    dry_run: bool = False
    """Check everything, print the plan, and stop before training. Set WORLD_SIZE to the
    number of ranks to be planned for."""

    def __post_init__(self) -> None:
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
            weight = self.tasks[name].weight
            require(
                math.isfinite(weight) and weight > 0, f"tasks.{name}.weight", "must be positive"
            )
            require(
                self.remix.preset is None or weight == 1,
                f"tasks.{name}.weight",
                "cannot be set with remix.preset paper, which takes the raw sum over tasks",
            )
        require(
            self.audit.enabled or not self.remix.require_audit,
            "remix.require_audit",
            "needs audit.enabled true",
        )
        require(0 <= self.seed < 2**32, "seed", f"({self.seed}) must be from 0 to 2**32 - 1")
        require(self.timeout_minutes > 0, "timeout_minutes", "must be positive")
        require(bool(self.run_dir), "run_dir", "must name a folder")
        self.remix = self.remix.settled()
        self.optimizer.bf16 = self.model.bf16
        self.optimizer.params_dtype = self.model.params_dtype
        self.optimizer.use_distributed_optimizer = True
        self.ddp.use_distributed_optimizer = True
        # As Megatron does: bf16 gradients are accumulated and reduced in float32.
        self.ddp.grad_reduce_in_fp32 = self.ddp.grad_reduce_in_fp32 or self.model.bf16
        if self.optimizer.min_lr is None:
            self.optimizer.min_lr = 0.0
        if self.data.reset_attention_mask:
            self.model.masked_softmax_fusion = False

    # Derived sizes ---------------------------------------------------------------------

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
        """Why there is no reset at this iteration, in words; empty if there is one."""
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

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks in a world of this size."""
        tp, pp = self.model.tensor_model_parallel_size, self.model.pipeline_model_parallel_size
        return world_size // (tp * pp)

    def check(self, world_size: int) -> None:
        """Refuse what cannot run on `world_size` ranks, before anything is built.

        Raises:
            InputError: names the field and the remedy.
        """
        self._check_supported()
        self._check_layout(world_size)
        self._check_schedule()
        self._check_boundaries()

    def _check_supported(self) -> None:
        model, optimizer = self.model, self.optimizer
        unsupported = {
            "model.context_parallel_size": model.context_parallel_size > 1,
            "model.expert_model_parallel_size": model.expert_model_parallel_size > 1,
            "model.num_moe_experts": model.num_moe_experts is not None,
            "model.mtp_num_layers": bool(model.mtp_num_layers),
            "model.fp16": model.fp16,
            # megatron-core's norm of plain torch refuses it; those of TE and Apex need a GPU.
            "model.sequence_parallel without a GPU": (
                model.sequence_parallel and not torch.cuda.is_available()
            ),
            "model.fp8": bool(model.fp8),
            "ddp.use_megatron_fsdp": self.ddp.use_megatron_fsdp,
            "ddp.num_distributed_optimizer_instances": (
                self.ddp.num_distributed_optimizer_instances > 1
            ),
            f"optimizer.optimizer {optimizer.optimizer}": optimizer.optimizer != "adam",
            "model.multi_latent_attention": model.multi_latent_attention,
            # It casts gradients to bf16, also in fp32: the loss would change without a word.
            "model.cross_entropy_loss_fusion": model.cross_entropy_loss_fusion,
            "ddp.average_in_collective": self.ddp.average_in_collective,
            "optimizer.optimizer_cpu_offload": optimizer.optimizer_cpu_offload,
            "optimizer.use_precision_aware_optimizer": optimizer.use_precision_aware_optimizer,
        }
        for name, used in unsupported.items():
            require(not used, name, "is not supported yet; leave it at its default")
        # Transformer Engine's causal attention, fused kernels and windows pay no heed to a mask.
        local = model.transformer_impl == "local" or (
            model.transformer_impl == "auto" and not torch.cuda.is_available()
        )
        require(
            not self.data.reset_attention_mask or (local and model.window_size is None),
            "data.reset_attention_mask",
            "needs model.transformer_impl local, and no model.window_size",
        )
        require(model.calculate_per_token_loss, "model.calculate_per_token_loss", "must stay true")

    def _check_layout(self, world_size: int) -> None:
        model, train = self.model, self.train
        tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
        require(
            world_size % (tp * pp) == 0,
            "model",
            f"needs a multiple of tensor_model_parallel_size {tp} × pipeline_model_parallel_size "
            f"{pp} = {tp * pp} ranks, and {world_size} were launched",
        )
        require(
            model.make_vocab_size_divisible_by % tp == 0,
            "model.make_vocab_size_divisible_by",
            f"must be a multiple of tensor_model_parallel_size {tp}",
        )
        require(
            model.hidden_size % model.num_attention_heads == 0,
            "model.hidden_size",
            f"({model.hidden_size}) must be a multiple of num_attention_heads "
            f"{model.num_attention_heads}",
        )
        groups = model.num_query_groups or model.num_attention_heads
        require(
            model.num_attention_heads % groups == 0 and groups % tp == 0,
            "model.num_query_groups",
            f"({groups}) must divide num_attention_heads {model.num_attention_heads}, and be a "
            f"multiple of tensor_model_parallel_size {tp}",
        )
        require(
            (model.ffn_hidden_size or 0) > 0 and model.ffn_hidden_size % tp == 0,
            "model.ffn_hidden_size",
            f"({model.ffn_hidden_size}) must be a multiple of tensor_model_parallel_size {tp}",
        )
        require(
            model.virtual_pipeline_model_parallel_size is None or pp > 1,
            "model.virtual_pipeline_model_parallel_size",
            "needs pipeline_model_parallel_size 2 or more",
        )
        layers_at_once = pp * (model.virtual_pipeline_model_parallel_size or 1)
        require(
            model.num_layers % layers_at_once == 0,
            "model.num_layers",
            f"({model.num_layers}) must be a multiple of {layers_at_once} pipeline stages",
        )
        step = train.micro_batch_size * self.data_parallel_size(world_size)
        for _, size in train.batch_sizes.steps:
            field, of = "train.global_batch_size", f"({size})"
            if size != train.global_batch_size:
                field, of = "train.rampup_batch_size", f"gives batches of {size}, which"
            require(
                size % step == 0,
                field,
                f"{of} must be a multiple of micro_batch_size {train.micro_batch_size} × "
                f"{self.data_parallel_size(world_size)} data-parallel ranks = {step}",
            )
            require(
                model.virtual_pipeline_model_parallel_size is None or size // step % pp == 0,
                field,
                f"{of} must give a multiple of {pp} micro-batches, for the interleaved "
                f"pipeline; it gives {size // step}",
            )

    def _check_schedule(self) -> None:
        lr, min_lr = self.optimizer.lr, self.optimizer.min_lr
        require(lr is not None and lr > 0, "optimizer.lr", "must be given, and positive")
        require(0 <= min_lr <= lr, "optimizer.min_lr", f"({min_lr}) must be from 0 to lr {lr}")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self.optimizer, name)
            require(0 <= value < 1, f"optimizer.{name}", f"({value}) must be from 0 to below 1")
        require(self.optimizer.weight_decay >= 0, "optimizer.weight_decay", "must not be negative")
        decay_iters = self.scheduler.lr_decay_iters
        decay_iters = self.train.train_iters if decay_iters is None else decay_iters
        require(decay_iters > 0, "scheduler.lr_decay_iters", "must be positive")
        require(
            self.scheduler.lr_wsd_decay_iters is None
            or 0 < self.scheduler.lr_wsd_decay_iters <= decay_iters,
            "scheduler.lr_wsd_decay_iters",
            f"must be from 1 to the {decay_iters} iterations of the schedule",
        )
        require(
            self.scheduler.lr_warmup_iters < decay_iters,
            "scheduler.lr_warmup_iters",
            f"({self.scheduler.lr_warmup_iters}) must be fewer than the {decay_iters} iterations "
            f"of the schedule",
        )

    def _check_boundaries(self) -> None:
        require(
            not self.remix.constraints.epoch_caps,
            "remix.constraints.epoch_caps",
            "follows from remix.constraints.max_epochs; set that",
        )
        remix, batch = self.remix, self.train.global_batch_size
        require(
            remix.first_interval_samples is None or remix.interval_samples is not None,
            "remix.first_interval_samples",
            "goes with remix.interval_samples",
        )
        if remix.interval_samples is None or remix.policy == "schedule":
            return
        first = (
            "interval_samples" if remix.first_interval_samples is None else "first_interval_samples"
        )
        for name in {"interval_samples", first}:
            samples = getattr(remix, name)
            below = max(samples // batch * batch, 0)
            require(
                samples > 0 and samples % batch == 0,
                f"remix.{name}",
                f"({samples}) must be a whole number of global batches of {batch} samples; the "
                f"nearest are {below or batch} and {(below or batch) + batch}",
            )
        samples = getattr(remix, first)
        settled = math.ceil(3 / (1 - self.optimizer.adam_beta2))
        sizes = self.train.batch_sizes
        begins = int(sizes.batch_of(sizes.end_from(samples)))
        require(
            remix.policy == "static" or self.probe.curvature != "adam" or begins >= settled,
            f"remix.{first}",
            f"({samples}) puts the first boundary at iteration {begins}, before Adam's "
            f"second moment has settled (3 / (1 − adam_beta2) = {settled} iterations); use at "
            f"least {settled * batch}, a smaller optimizer.adam_beta2, or probe.curvature identity",
        )


def require(condition: bool, name: str, problem: str) -> None:
    """Raise :class:`InputError` naming the field unless `condition` holds."""
    if not condition:
        raise InputError(f"{name} {problem}")


# Reading it ------------------------------------------------------------------------------

_USAGE = """\
torchrun --nproc-per-node N -m megatron_tikmix CONFIG.yaml [--section.field value ...]

Pretrain a megatron-core GPT while TiKMiX resets the mixture of domains at every interval
boundary. CONFIG.yaml gives the run; options on the command line override it. Started again
with the same run_dir, a run resumes from its newest checkpoint.

examples:
  torchrun --nproc-per-node 2 -m megatron_tikmix examples/quickstart.yaml
  torchrun --nproc-per-node 2 -m megatron_tikmix examples/quickstart.yaml \\
      --model.tensor_model_parallel_size 2 --run_dir runs/tp2
  WORLD_SIZE=8 python -m megatron_tikmix CONFIG.yaml --dry_run true     # check and plan only

Below are the fields most often set. Sections model, optimizer and ddp take every field of
megatron-core's TransformerConfig, OptimizerConfig and DistributedDataParallelConfig as well.
"""

# Of megatron-core's several hundred fields, those that --help lists.
_SHOWN = {
    "model": """num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size
        normalization gated_linear_unit activation_func add_bias_linear hidden_dropout
        attention_dropout init_method_std tensor_model_parallel_size
        pipeline_model_parallel_size virtual_pipeline_model_parallel_size sequence_parallel
        bf16 recompute_granularity position_embedding_type rotary_base rotary_percent
        share_embeddings_and_output_weights make_vocab_size_divisible_by transformer_impl""",
    "optimizer": "lr min_lr weight_decay adam_beta1 adam_beta2 adam_eps clip_grad",
    "ddp": "overlap_grad_reduce overlap_param_gather bucket_size grad_reduce_in_fp32",
}


# Fields that follow from others (see the `__post_init__` methods).
_DERIVED = (
    "model.params_dtype",
    "model.pipeline_dtype",
    "model.deallocate_pipeline_outputs",
    "model.overlap_p2p_comm",
    "model.batch_p2p_comm",
    "model.ffn_hidden_size",
    "model.num_query_groups",
    "model.kv_channels",
    "remix.constraints.pareto",
    "remix.influence",
    "remix.gain",
    "remix.diversity_reference",
    "remix.smoothing",
    "optimizer.bf16",
    "optimizer.params_dtype",
    "optimizer.use_distributed_optimizer",
    "optimizer.min_lr",
    "ddp.use_distributed_optimizer",
    "ddp.grad_reduce_in_fp32",
)


set_parsing_settings(docstring_parse_attribute_docstrings=True)


def build_parser(for_help: bool = False) -> ArgumentParser:
    """The parser of every ``--section.field``, with a ``--config`` file beneath them.

    `for_help` hides the rarely used fields of megatron-core; hidden ones would be left out of
    the resolved configuration too, so a real run is parsed without it.
    """
    parser = ArgumentParser(
        prog="megatron_tikmix", usage=_USAGE, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="the run's YAML file")
    parser.add_class_arguments(RunConfig, as_group=True)
    for action in parser._actions if for_help else ():
        section, _, name = action.dest.partition(".")
        if section in _SHOWN and name and name not in _SHOWN[section].split():
            action.help = SUPPRESS
    return parser


def load_config(arguments: list[str]) -> tuple[RunConfig, str]:
    """Read ``[CONFIG.yaml] [--section.field value ...]``.

    Returns:
        The run, and its resolved YAML, which read back gives the same run.

    Raises:
        InputError: an unknown field (the nearest valid name is given), a value of the wrong
            type, or a combination that megatron-core refuses.
        SystemExit: ``--help`` was asked for.
    """
    file = "the configuration"
    if arguments and not arguments[0].startswith("-"):
        file = arguments[0]
        if not Path(file).is_file():
            raise InputError(f"{file}: no such configuration file")
        arguments = ["--config", *arguments]
    parser = build_parser(for_help=bool({"-h", "--help"} & set(arguments)))
    try:
        settings = parser.parse_args(arguments)
        settings.pop("config")
        config = RunConfig(**parser.instantiate(settings).as_dict())
        for name in _DERIVED:  # the record shows what is used, not what was asked for
            settings[name] = attrgetter(name)(config)
        return config, parser.dump(settings, skip_none=False)
    except InputError:
        raise
    except (ArgumentError, ValueError, AssertionError, TypeError, ZeroDivisionError) as error:
        raise InputError(_in_one_sentence(str(error), parser, file)) from error


def _in_one_sentence(message: str, parser: ArgumentParser, file: str) -> str:
    """The parser's complaint on one line; an unknown field gets the nearest valid name."""
    message = re.sub(r"\s+", " ", message).strip()
    if "codec can't decode" in message:
        return f"{file} is not valid UTF-8: {message}"
    message = message.replace("Unexpected config:", f"{file} holds no configuration:")
    message = message.replace("Problems parsing config", f"{file} is not readable YAML")
    unknown = re.search(
        r"Group '(?P<group>\S+)' does not accept option '(?P<key>\S+)'"
        r"|Option '(?P<name>\S+)' is not accepted|[Uu]nrecognized arguments: --(?P<option>[^\s=]+)",
        message,
    )
    if unknown is None:
        return message
    name = unknown["name"] or unknown["option"] or f"{unknown['group']}.{unknown['key']}"
    fields = [action.dest for action in parser._actions] + ["domain", "weight"]
    nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else "see --help"
    return f"unknown configuration field {name}; {hint}"


def launched_world() -> tuple[int, int, int]:
    """(rank, local rank, world size), from the variables torchrun sets; 0, 0, 1 without it."""
    read = os.environ.get
    return int(read("RANK", 0)), int(read("LOCAL_RANK", 0)), int(read("WORLD_SIZE", 1))
