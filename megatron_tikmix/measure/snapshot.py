"""A snapshot of training's state, taken before steps that are to be undone."""

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tikmix.measure.shards import OptimizerSnapshot
from megatron_tikmix.megatron.rng import reseeded, rng_state, set_rng_state
from megatron_tikmix.megatron.step import zero_gradients


class TrainingSnapshot:
    """A copy of all that steps change: parameters, optimizer, scheduler, random streams, modes.

    Take it between two optimizer steps. Each rank copies only what it owns: with the distributed
    optimizer in bf16 that is 14 bytes for each parameter, divided by the data-parallel size. The
    gradient buffers are not copied: restoring empties them, as the next step does anyway.
    """

    def __init__(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._state: OptimizerSnapshot | None = OptimizerSnapshot(optimizer)
        self._num_steps = scheduler.num_steps
        self._rng = rng_state()
        # DistributedDataParallel calls its own buffers `buffers`: ask the module it wraps.
        buffers = [buffer for chunk in model for buffer in chunk.module.buffers()]
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        self._modes = [(part, part.training) for chunk in model for part in chunk.modules()]

    @torch.no_grad()
    def restore(self, seed: int | None = None) -> None:
        """Restore everything, bit for bit, and empty the gradient buffers. Collective.

        It can be called repeatedly, until :meth:`release`.

        Args:
            seed: start the random streams anew from this instead of restoring them (see
                :func:`~megatron_tikmix.megatron.rng.reseeded`).
        """
        if self._state is None:
            raise RuntimeError("the snapshot has been released")
        for chunk in self._model:
            # A step that was interrupted may have left a reduction running.
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                if group.grad_reduce_handle is not None:
                    group.grad_reduce_handle.wait()
                    group.grad_reduce_handle = None
        zero_gradients(self._model, self._optimizer)
        gathers_late = [chunk for chunk in self._model if chunk.ddp_config.overlap_param_gather]
        for chunk in gathers_late:
            chunk.start_param_sync(force_sync=True)  # a late gather would overwrite them
        self._state.restore()
        for chunk in self._model:
            chunk.start_param_sync(force_sync=True)
        for buffer, saved in self._buffers:
            buffer.copy_(saved)
        for part, training in self._modes:
            part.training = training
        self._scheduler.num_steps = self._num_steps
        set_rng_state(self._rng if seed is None else reseeded(self._rng, seed))

    def release(self) -> None:
        """Free the copies."""
        self._state = None
        self._buffers = []
        self._modes = []
