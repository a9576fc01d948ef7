"""One run: all sections, and the sizes that follow from them."""

import math
import re
from dataclasses import dataclass, field

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_tikmix.config.checks import (
    check_boundaries,
    check_layout,
    check_schedule,
    check_supported,
)
from megatron_tikmix.config.data import DataConfig, EvaluateConfig, TaskConfig
from megatron_tikmix.config.model import GPTConfig
from megatron_tikmix.config.probe import ProbeConfig
from megatron_tikmix.config.remix import AuditConfig, RemixConfig, RolloutConfig
from megatron_tikmix.config.requirement import require
from megatron_tikmix.config.train import CheckpointConfig, SchedulerConfig, TrainConfig


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

    baseline: str | None = None
    """Another run's `run_dir`: report.html holds this run's task losses against its."""

    seed: int = 1234
    """Seed of parameters, dropout and sample order."""

    timeout_minutes: float = 30.0
    """A collective that waits longer than this ends the job."""

    decision_timeout_minutes: float = 240.0
    """How long the other ranks wait for rank 0 to decide a mixture: that of a group of their own,
    so that a long solve trips neither NCCL's timeout nor timeout_minutes."""

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
        for name in ("timeout_minutes", "decision_timeout_minutes"):
            require(getattr(self, name) > 0, name, "must be positive")
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
        check_supported(self)
        check_layout(self, world_size)
        check_schedule(self)
        check_boundaries(self)
