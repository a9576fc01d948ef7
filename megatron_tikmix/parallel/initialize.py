"""Process groups: torch.distributed and megatron-core's, made once and handed on."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tikmix.config import GPTConfig, launched_world


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the job, and the groups it talks through."""

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    """megatron-core's groups: tp, pp, dp, mp, ..."""
    cpu_group: dist.ProcessGroup
    """All ranks, over gloo: decisions travel here, whatever the accelerators are doing."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    @property
    def data_parallel_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_parallel_size(self) -> int:
        return self.groups.dp.size()

    @property
    def reports_loss(self) -> bool:
        """True on exactly one rank of each model replica: it has the loss, and counts it."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1 and self.groups.tp.rank() == 0


def initialize(model: GPTConfig, seed: int, timeout_minutes: float) -> Parallel:
    """Join the job that torchrun started (or be a job of one) and lay out its ranks.

    The layout itself was checked by :meth:`RunConfig.check`.
    """
    rank, local_rank, world_size = launched_world()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0")  # a job of one: any free port
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Parallel(
        rank=rank,
        world_size=world_size,
        device=torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        cpu_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def shut_down() -> None:
    """Leave the job."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
