"""What megatron-core's distributed optimizer holds, shard by shard: read, and put back.

Together with ``parallel/cpu.py`` the only file that touches private names of megatron-core;
``tests/unit/training/test_optimizer_state.py`` holds the installed version to them.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class _Shard:
    """The part of one parameter, flattened, that this rank's optimizer owns."""

    parameter: torch.nn.Parameter
    optimizer: DistributedOptimizer
    start: int
    end: int
    real: int
    """How many of its elements, from `start` on, are not vocabulary padding."""


class OptimizerShards:
    """What this rank's optimizer holds, as flat vectors of the same P elements each.

    Over all ranks every parameter of the model is counted exactly once: parameters that
    tensor-parallel ranks hold copies of, and the last stage's copy of a tied embedding, are
    left out but on one rank; data-parallel ranks own disjoint slices.

    Raises:
        TypeError: the optimizer is not megatron-core's distributed optimizer with Adam.
    """

    def __init__(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        vocab_size: int,
    ) -> None:
        names = {p: name for chunk in model for name, p in chunk.named_parameters()}
        self._shards = [
            _Shard(
                parameter,
                part,
                span.start,
                span.end,
                _real_elements(parameter, names[parameter], span, groups, vocab_size),
            )
            for part in distributed_optimizers(optimizer)
            for parameter, span in _owned(part)
            if param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter, tp_group=groups.tp)
        ]
        self.device = next(model[0].parameters()).device

    @property
    def numel(self) -> int:
        """P, this rank's elements."""
        return sum(shard.end - shard.start for shard in self._shards)

    def gradient(self) -> torch.Tensor:
        """The reduced gradient, float32 (P,); a copy."""
        return self._flat(
            # megatron-core's gradient buffer, which DistributedDataParallel gives each parameter.
            getattr(shard.parameter, "main_grad").view(-1)[shard.start : shard.end]  # noqa: B009
            for shard in self._shards
        )

    def second_moment(self) -> torch.Tensor:
        """Adam's second moment, bias-corrected, float32 (P,).

        Raises:
            RuntimeError: the optimizer has not taken a step yet.
        """
        return self._flat(_second_moment(shard) for shard in self._shards)

    def root_sum_and_count(self, second_moment_P: torch.Tensor) -> torch.Tensor:
        """Σ √v̂ and the number of elements, without vocabulary padding, float64 (2,).

        Summed over ranks it gives the mean that damping is relative to.
        """
        total = torch.zeros(2, dtype=torch.float64)
        first = 0
        for shard in self._shards:
            total[0] += second_moment_P[first : first + shard.real].sqrt().double().sum().cpu()
            total[1] += shard.real
            first += shard.end - shard.start
        return total

    def _flat(self, pieces: Iterator[torch.Tensor]) -> torch.Tensor:
        empty = torch.empty(0, device=self.device)
        return torch.cat([empty, *(piece.detach().float() for piece in pieces)])


class OptimizerSnapshot:
    """Everything an optimizer step changes, as it is now, of this rank's shards alone.

    Copies this rank's part of the parameters (in their own precision), the main parameters, the
    optimizer's state with its step counts, the parameter groups' learning rates and the like, and
    the loss scale. Taking it needs no other rank; the parts of the parameters that other ranks
    own are not in it, so after :meth:`restore` they must be gathered again.

    Raises:
        TypeError: the optimizer is not megatron-core's distributed optimizer with Adam.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._parts = [_PartSnapshot(part) for part in distributed_optimizers(optimizer)]

    def restore(self) -> None:
        """Put everything back, bit for bit; may be called again."""
        for part in self._parts:
            part.restore()


class _PartSnapshot:
    """The snapshot of one distributed optimizer."""

    def __init__(self, part: DistributedOptimizer) -> None:
        self._part = part
        inner = part.optimizer
        shards = [p.data.view(-1)[span.start : span.end] for p, span in _owned(part)]
        mains = [p.data for group in inner.param_groups for p in group["params"]]
        # In float32 the main parameters are the shards themselves, not copies of them.
        places = {(tensor.data_ptr(), tensor.numel()): tensor for tensor in [*shards, *mains]}
        self._saved = [(tensor, tensor.clone()) for tensor in places.values()]
        self._states = {p: _saved_entries(state) for p, state in inner.state.items()}
        self._groups = [_saved_entries(group, but="params") for group in inner.param_groups]
        scaler = part.grad_scaler
        self._scaler = None if scaler is None else copy.deepcopy(scaler.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        inner = self._part.optimizer
        for place, saved in self._saved:
            place.copy_(saved)
        for parameter in list(inner.state):
            if parameter not in self._states:  # its first step came after the snapshot
                del inner.state[parameter]
        for parameter, entries in self._states.items():
            _put_back(inner.state[parameter], entries)
        for group, entries in zip(inner.param_groups, self._groups, strict=True):
            _put_back(group, entries, but="params")
        if self._scaler is not None:
            self._part.grad_scaler.load_state_dict(copy.deepcopy(self._scaler))


_Entries = dict[str, tuple[Any, Any]]


def _saved_entries(values: dict[str, Any], but: str | None = None) -> _Entries:
    """Each entry itself, and a copy of what it holds."""
    return {key: (value, copy.deepcopy(value)) for key, value in values.items() if key != but}


def _put_back(values: dict[str, Any], entries: _Entries, but: str | None = None) -> None:
    for key in [key for key in values if key != but and key not in entries]:
        del values[key]
    for key, (value, saved) in entries.items():
        if isinstance(value, torch.Tensor):
            value.copy_(saved)  # in place: others may hold this very tensor
            values[key] = value
        else:
            values[key] = copy.deepcopy(saved)


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The distributed optimizers inside `optimizer`.

    Raises:
        TypeError: it is made of anything else.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for part in parts:
        if not isinstance(part, DistributedOptimizer):
            raise TypeError(
                f"{type(part).__name__} has no sharded second moment to read; "
                f"use megatron-core's distributed optimizer with Adam"
            )
    return [part for part in parts if not part.is_stub_optimizer]


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Each parameter of which this rank owns a part, and that part of it, flattened."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def _real_elements(
    parameter: torch.nn.Parameter,
    name: str,
    span: Any,
    groups: ProcessGroupCollection,
    vocab_size: int,
) -> int:
    if not name.endswith(_VOCABULARY):
        return int(span.end - span.start)
    rows, columns = parameter.shape
    real_rows = min(rows, max(0, vocab_size - groups.tp.rank() * rows))
    return int(min(span.end, max(span.start, real_rows * columns)) - span.start)


def _second_moment(shard: _Shard) -> torch.Tensor:
    state = shard.optimizer._get_main_param_and_optimizer_states(shard.parameter)
    group_index, _ = shard.optimizer.model_param_group_index_map[shard.parameter]
    group = shard.optimizer.optimizer.param_groups[group_index]
    # torch keeps the step with each parameter, Apex and Transformer Engine with the group.
    step = int(state["step"] if "step" in state else group.get("step", 0))
    if step == 0 or "exp_avg_sq" not in state:
        raise RuntimeError("the optimizer has no second moment before its first step")
    moment: torch.Tensor = state["exp_avg_sq"] / (1.0 - group["betas"][1] ** step)
    return moment


def mend_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Make checkpoints of the distributed optimizer work over plain torch Adam.

    Without Apex and Transformer Engine megatron-core falls back on torch's AdamW, whose state
    holds a `step` for each parameter. megatron-core 0.16 to 0.19 then fails to load into a
    fresh optimizer (there is no state yet), misses the key `step`, and shares one step tensor
    between all parameters, so that it would advance once per parameter after a resume. Call
    this before loading; :func:`unshare_steps` after.
    """
    for part in distributed_optimizers(optimizer):
        if not isinstance(part.optimizer, _TORCH_ADAM):
            continue
        if not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()
        part._set_main_param_and_optimizer_states = MethodType(_set_states, part)


def _set_states(
    self: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]
) -> None:
    step = self._get_main_param_and_optimizer_states(parameter)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(
        self, parameter, {"step": step, **tensors}
    )


def unshare_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own step count again (see :func:`mend_torch_adam`)."""
    for part in distributed_optimizers(optimizer):
        if isinstance(part.optimizer, _TORCH_ADAM):
            for state in part.optimizer.state.values():
                state["step"] = state["step"].clone()
