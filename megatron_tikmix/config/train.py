"""Sections `train`, `scheduler` and `checkpoint`."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_tikmix.config.requirement import require
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import BatchSizes

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
"""What a checkpoint may be resumed with another value of, if `allow_changed` names it."""


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

    exit_interval: int | None = None
    """Save and end the run at iterations divisible by this, with exit code 0."""

    exit_duration_in_mins: float | None = None
    """Save and end the run, with exit code 0, after the step in which so many minutes are over."""

    max_skipped_iterations: int = 3
    """An update whose gradient is not finite is skipped and counted, as in Megatron; the run ends
    with an error after so many in a row."""

    loss_spike_factor: float | None = 1.5
    """Warn of logged losses of more than so many times what the domains of their samples had of
    late, and count them; null: do not. They are trained on all the same."""

    def __post_init__(self) -> None:
        require(self.max_skipped_iterations > 0, "train.max_skipped_iterations", "must be positive")
        for name in ("exit_interval", "exit_duration_in_mins", "loss_spike_factor"):
            value = getattr(self, name)
            require(value is None or value > 0, f"train.{name}", "must be positive")
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


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoints under RUN_DIR/checkpoints; a run started again in its directory resumes."""

    save_interval: int | None = None
    """Iterations between checkpoints, besides one after every boundary and one at the end."""

    keep: int = 2
    """How many of the newest checkpoints to keep; older ones are deleted."""

    keep_every: int | None = None
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
        require(
            self.save_interval is None or self.save_interval > 0,
            "checkpoint.save_interval",
            "must be positive",
        )
        require(self.keep > 0, "checkpoint.keep", "must be positive")
        unknown = [name for name in self.allow_changed if name not in MAY_CHANGE]
        require(not unknown, "checkpoint.allow_changed", f"must be of {', '.join(MAY_CHANGE)}")
        require(
            self.keep_every is None or self.keep_every > 0,
            "checkpoint.keep_every",
            "must be positive",
        )
