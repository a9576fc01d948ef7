"""Workarounds for faults of megatron-core, in one place, to be removed once the faults are fixed.

=============================================  ====================================  ==========
fault                                          here                                  seen in
=============================================  ====================================  ==========
torch's Adam under the distributed optimizer:  :func:`mend_torch_adam`,              0.16 - 0.19
not loaded into a fresh one, `step` missing,   :func:`unshare_steps`
and one `step` shared by all parameters
state of several buckets is saved shifted      :func:`mend_buckets`                  0.16 - 0.19
an output is freed before it has been sent     `config.model.settle_pipeline`        0.16
interleaved stages mix up their messages       `config.model.settle_pipeline`        0.16
without Apex and Transformer Engine the norm   :func:`norm_on_the_device`            0.16 - 0.19
of the gradient waits once a parameter
the fused cross entropy casts to bf16          refused, ``config/checks.py``         0.16 - 0.19
results of a save travel through a process     :func:`results_without_a_process`,    0.16 - 0.19
that imports torch, outlives a killed rank,    :func:`results_past_sigterm`
and does not outlive SIGTERM
=============================================  ====================================  ==========

``tests/unit/megatron/test_faults.py`` and ``tests/distributed/test_pipeline_faults.py`` reproduce
them, and fail when one is gone; except for the freed output, which depends on timing: losses were
wrong in some runs and right in others.
"""

import inspect
import queue
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import MethodType
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.optimizer import MegatronOptimizer, clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.utils import local_multi_tensor_l2_norm
from torch.distributed.checkpoint.api import CheckpointException as CheckpointException

_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


@contextmanager
def results_without_a_process() -> Iterator[None]:
    """Keep the results of a save in the foreground in this process; wrap `dist_checkpointing.save`.

    megatron-core sends them through the server process of a multiprocessing manager, which only a
    save in the background needs. It is spawned, so it takes seconds to import torch again, and it
    is never ended when its rank is killed.
    """
    former = vars(filesystem_async).get("_results_queue")
    setattr(filesystem_async, "_results_queue", queue.Queue())  # noqa: B010
    try:
        yield
    finally:
        setattr(filesystem_async, "_results_queue", former)  # noqa: B010


@contextmanager
def results_past_sigterm() -> Iterator[None]:
    """Keep the results of a save in the background when all processes of a job get SIGTERM; wrap
    `dist_checkpointing.save`.

    A run that ends on a signal still waits for such a save. The process that holds the results is
    started by the first save, and inherits the set of blocked signals.
    """
    resource_tracker.ensure_running()  # if started with that process, it would unblock SIGTERM
    former = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def norm_on_the_device() -> None:
    """Let the norm of the gradient be computed where the gradient is; same bits.

    Without Apex and Transformer Engine megatron-core reads the norm of each parameter on the host,
    and so waits for the device once a parameter.
    """
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: list[list[torch.Tensor]], *flags: Any
) -> tuple[torch.Tensor, None]:
    norms = [torch.norm(tensor) for tensors in tensor_lists for tensor in tensors]
    return torch.norm(torch.stack(norms).float()).view(1), None


def mend_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Make the distributed optimizer's checkpoints work with plain torch Adam.

    Without Apex and Transformer Engine megatron-core uses torch's AdamW, whose state holds a `step`
    for each parameter. megatron-core 0.16 to 0.19 then fails to load into a new optimizer (there is
    no state yet), misses the key `step`, and shares one step tensor between all parameters, so that
    it would advance once for each parameter after a resume. In checkpoints of Megatron's default
    format, `dp_reshardable`, there is a `step` that is that of a new optimizer, and parameters in
    float32 are copied to without `no_grad`. Call this before loading, and :func:`unshare_steps`
    after it.
    """
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, _TORCH_ADAM):
            continue
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
        part._set_main_param_and_optimizer_states = MethodType(_set_states, part)


@torch.no_grad()
def _set_states(
    self: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    step = self._get_main_param_and_optimizer_states(parameter)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(
        self, parameter, {**tensors, "step": step}
    )


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own step count again (see :func:`mend_torch_adam`)."""
    for part in _parts(optimizer):
        if isinstance(part.optimizer, _TORCH_ADAM):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()


def mend_buckets(optimizer: MegatronOptimizer) -> None:
    """Make the distributed optimizer's checkpoints correct when a buffer has several buckets.

    `fully_reshardable` cuts each parameter's state out of one tensor for each buffer. megatron-core
    0.16 makes that tensor without the padding between buckets, but cuts it at offsets that include
    the padding: all parameters behind the first padded bucket are silently saved shifted, and a
    resumed run continues with wrong weights. There are several buckets with
    `ddp.overlap_grad_reduce`, with tied embeddings on pipeline stages, and with interleaved stages.
    Call this before saving.
    """
    for part in _parts(optimizer):
        part.get_parameter_state_dp_zero = MethodType(_state_with_padding, part)


def _state_with_padding(self: DistributedOptimizer, **options: Any) -> Any:
    state = DistributedOptimizer.get_parameter_state_dp_zero(self, **options)
    for index, buffer in enumerate(self.buffers if state else ()):
        for tensors in state[index].values():
            for key in ("param", "exp_avg", "exp_avg_sq"):
                if key in tensors and len(tensors[key]) == buffer.numel_unpadded:
                    tensors[key] = _padded(tensors[key], buffer)
    return state


def _padded(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Return the buffer's values with padding between buckets, from those without."""
    whole = packed.new_zeros(buffer.numel)
    parts = packed.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, part in zip(buffer.buckets, parts, strict=True):
        whole[bucket.offset : bucket.offset + len(part)] = part
    return whole


def _parts(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not part.is_stub_optimizer]


def writes_of_one_rank() -> list[tuple[Any, str]]:
    """Return (owner, name) of each function that writes files of a checkpoint on rank 0 alone.

    0.16 writes objects that are no tensors to `common.pt` by a strategy; later versions write them
    with the tensors, on every rank.
    """
    places: list[tuple[Any, str]] = [
        (FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ]
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is not None:
        places.insert(0, (strategy, "save_common"))
    return places


def options_of_an_asynchronous_save() -> dict[str, Any]:
    """Return arguments that make `dist_checkpointing.save` use megatron-core's own writer.

    The default since 0.17 is that of nvidia-resiliency-ext, which may not be installed.
    """
    parameters = inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if "async_strategy" in parameters else {}
