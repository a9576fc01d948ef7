"""Process groups: those of torch.distributed and megatron-core, made once and passed on."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tikmix.config import GPTConfig, launched_world
from megatron_tikmix.errors import InputError

TIMEOUT_MINUTES = 30.0
DECISION_TIMEOUT_MINUTES = 240.0


@dataclass(frozen=True)
class Parallel:
    """This rank's place in the job, and its process groups."""

    rank: int
    world_size: int
    device: torch.device
    groups: ProcessGroupCollection
    """megatron-core's groups: tp, pp, dp, mp, ..."""
    cpu_group: dist.ProcessGroup
    """All ranks, over gloo: for sums and comparisons that do not wait for the accelerators."""
    decision_group: dist.ProcessGroup
    """All ranks, over gloo, with a timeout of its own: for broadcasting decisions, for which the
    other ranks wait while the main rank solves."""

    @classmethod
    def from_megatron(
        cls,
        groups: ProcessGroupCollection | None = None,
        *,
        timeout_minutes: float = TIMEOUT_MINUTES,
        decision_timeout_minutes: float = DECISION_TIMEOUT_MINUTES,
    ) -> "Parallel":
        """Return a Parallel with the process groups that a Megatron loop has made. Collective.

        Args:
            groups: megatron-core's groups; None: those of its `parallel_state`.
            timeout_minutes, decision_timeout_minutes: timeouts of the two gloo groups made here,
                as in :class:`~megatron_tikmix.config.RunConfig`.

        Raises:
            InputError: `parallel_state` has not been initialised.
        """
        if not parallel_state.is_initialized():
            raise InputError(
                "megatron-core has no process groups yet; call "
                "parallel_state.initialize_model_parallel first"
            )
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else "cpu"
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=torch.device(device),
            groups=groups or ProcessGroupCollection.use_mpu_process_groups(),
            cpu_group=_gloo_group(timeout_minutes),
            decision_group=_gloo_group(decision_timeout_minutes),
        )

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
        """True on exactly one rank of each model replica, which has the loss and counts it."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1 and self.groups.tp.rank() == 0


def initialize(
    model: GPTConfig,
    seed: int,
    timeout_minutes: float,
    decision_timeout_minutes: float = DECISION_TIMEOUT_MINUTES,
) -> Parallel:
    """Join the job that torchrun started (or be a job of one rank), and make its process groups.

    The layout must have been checked by :meth:`RunConfig.check`.
    """
    _, local_rank, _ = launched_world()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0")  # a job of one: any free port
    timeout = timedelta(minutes=timeout_minutes)
    # When torchrun restarts a job, its store still has the addresses of the former ranks.
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        timeout=timeout,
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=world_size,
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Parallel.from_megatron(
        timeout_minutes=timeout_minutes, decision_timeout_minutes=decision_timeout_minutes
    )


def _gloo_group(timeout_minutes: float) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))


def shut_down() -> None:
    """Destroy the process groups."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
