"""One run: all sections, and the sizes that follow from them."""

from dataclasses import dataclass, field
from typing import Literal

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig

from megatron_tikmix.config.checks import (
    check_boundaries,
    check_layout,
    check_schedule,
    check_supported,
)
from megatron_tikmix.config.model import GPTConfig
from megatron_tikmix.config.ranges import PositiveFloat, Seed
from megatron_tikmix.config.remix import AuditConfig, RemixConfig, RolloutConfig
from megatron_tikmix.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    MixtureSections,
    ProbeConfig,
    SchedulerConfig,
    TaskConfig,
    TrainConfig,
)


@dataclass(kw_only=True)
class RunConfig(MixtureSections):
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

    seed: Seed = 1234
    """Seed of parameters, dropout and sample order."""

    timeout_minutes: PositiveFloat = 30.0
    """A collective that waits longer than this ends the job."""

    decision_timeout_minutes: PositiveFloat = 240.0
    """How long the other ranks wait for rank 0 to decide a mixture: that of a group of their own,
    so that a long solve trips neither NCCL's timeout nor timeout_minutes."""

    device_name: Literal["a100", "h100", "h200", "b200"] | None = None
    """The plan tells what a boundary takes on this accelerator, by part. It need not be there."""

    dry_run: bool = False
    """Check everything, print the plan, and stop before training. Set WORLD_SIZE to the
    number of ranks to be planned for."""

    def __post_init__(self) -> None:
        self.check_sections()
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
        check_boundaries(self, self.optimizer.adam_beta2)
