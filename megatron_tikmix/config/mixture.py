"""The sections that are about the mixture, whoever trains: what they mean together."""

import math
import re
from dataclasses import dataclass, field

from megatron_tikmix.config.data import DataConfig, TaskConfig
from megatron_tikmix.config.probe import ProbeConfig
from megatron_tikmix.config.remix import AuditConfig, RemixConfig, RolloutConfig
from megatron_tikmix.config.requirement import require
from megatron_tikmix.config.train import SchedulerConfig, TrainConfig


class MixtureSections:
    """What data, probe, decision and rollouts go by: the fields they ask for, and what follows.

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
    seed: int

    def check_sections(self) -> None:
        """Refuse sections that do not fit together, and settle what is None in `remix`.

        Raises:
            InputError: names the field and the remedy.
        """
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
        require(bool(self.run_dir), "run_dir", "must name a folder")
        require(0 <= self.seed < 2**32, "seed", f"({self.seed}) must be from 0 to 2**32 - 1")
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


@dataclass(kw_only=True)
class HostedConfig(MixtureSections):
    """What a Remixer in a training loop that is not ours goes by.

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
    """Where large domains' indices are kept (`data.path_to_cache`)."""

    seed: int = 1234
    """Seed of the sample order."""

    def __post_init__(self) -> None:
        self.check_sections()
