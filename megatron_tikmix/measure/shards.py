"""The shards of megatron-core's distributed optimizer: reading and restoring them.

Besides ``megatron/cpu.py`` and ``megatron/faults.py`` this is the only file that uses private names
of megatron-core; ``tests/unit/megatron/test_megatron_contract.py`` checks that the installed
version has them.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import unwrap_model

from megatron_tikmix.config import ParametersConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.collectives import sum_over_ranks
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.optimizer import distributed_optimizers

_VOCABULARY = ("word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class _Shard:
    """The part of one parameter, flattened, that this rank's optimizer owns."""

    parameter: torch.nn.Parameter
    optimizer: DistributedOptimizer
    start: int
    end: int
    real: int
    """Number of its elements, from `start` on, that are not vocabulary padding."""


class OptimizerShards:
    """The gradient and the state in this rank's optimizer, as flat vectors of P elements each.

    Over all ranks every parameter of the model is counted exactly once: of copies on several
    tensor-parallel ranks, or of a tied embedding on the last stage, only one is counted;
    data-parallel ranks own disjoint slices.

    Args:
        selects: tells by its global name whether a parameter counts (see
            :func:`~megatron_tikmix.measure.shards.global_names`); default: all do.

    Raises:
        TypeError: the optimizer is not megatron-core's distributed optimizer with Adam.
    """

    def __init__(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        groups: ProcessGroupCollection,
        vocab_size: int,
        selects: Callable[[str], bool] = lambda name: True,
    ) -> None:
        names = global_names(model)
        self._model = model
        self._counted = [
            parameter
            for chunk in model
            for parameter in chunk.parameters()
            if parameter.requires_grad
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter, tp_group=groups.tp)
            and selects(names[parameter])
        ]
        counted = set(self._counted)
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
            if parameter in counted
        ]
        self.device = next(model[0].parameters()).device

    @property
    def numel(self) -> int:
        """P, the number of this rank's elements."""
        return sum(shard.end - shard.start for shard in self._shards)

    @property
    def whole_numel(self) -> int:
        """Number of elements with those owned by other data-parallel ranks."""
        return sum(parameter.numel() for parameter in self._counted)

    def pieces(self) -> list[torch.Tensor]:
        """Return the reduced gradient as flat views of the gradient buffer, P elements in all."""
        return [_gradient(s.parameter)[s.start : s.end] for s in self._shards]

    def whole_pieces(self) -> list[torch.Tensor]:
        """Return the gradient with the parts of other data-parallel ranks, as flat views.

        They have `whole_numel` elements in all.
        """
        return [_gradient(parameter) for parameter in self._counted]

    def gradient(self) -> torch.Tensor:
        """Return a copy of the reduced gradient, float32 (P,)."""
        return self._flat(self.pieces())

    def scatter(self, vector_P: torch.Tensor) -> list[torch.Tensor]:
        """Write a vector to this rank's shard of the gradient buffer.

        Returns:
            the parts of the buffer to all-gather over data-parallel ranks; after that
            :meth:`whole_pieces` returns the whole vector.
        """
        first = 0
        for piece in self.pieces():
            piece.copy_(vector_P[first : first + piece.numel()])
            first += piece.numel()
        return [
            bucket.grad_data
            for chunk in self._model
            for buffer in chunk.buffers
            for bucket in buffer.buckets
        ]

    def has_second_moment(self) -> bool:
        """Return whether Adam has taken a step with every parameter counted here."""
        return all(_step_and_state(shard)[0] > 0 for shard in self._shards)

    def second_moment(self) -> torch.Tensor:
        """Return Adam's second moment, bias-corrected, float32 (P,).

        Raises:
            RuntimeError: the optimizer has not taken a step yet.
        """
        return self._flat(_second_moment(shard) for shard in self._shards)

    def root_sum_and_count(self, second_moment_P: torch.Tensor) -> torch.Tensor:
        """Return Σ √v̂ and the number of elements without padding, float64 (2,), on the device.

        Their sums over ranks give the mean to which damping is relative.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        first = 0
        for shard in self._shards:
            total[0] += second_moment_P[first : first + shard.real].sqrt().double().sum()
            total[1] += shard.real
            first += shard.end - shard.start
        return total

    def _flat(self, pieces: Iterable[torch.Tensor]) -> torch.Tensor:
        empty = torch.empty(0, device=self.device)
        return torch.cat([empty, *(piece.detach().float() for piece in pieces)])


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    # megatron-core's gradient buffer, which DistributedDataParallel gives each parameter.
    main_grad: torch.Tensor = getattr(parameter, "main_grad")  # noqa: B009
    return main_grad.view(-1)


class OptimizerSnapshot:
    """A copy of everything an optimizer step changes in this rank's shards.

    It holds this rank's part of the parameters (in their own precision), the main parameters, the
    optimizer's state with its step counts, the parameter groups' learning rates and the like, and
    the loss scale. Taking it needs no other rank. Parts of the parameters that other ranks own are
    not in it, and must be gathered again after :meth:`restore`.

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
            if parameter not in self._states:  # it had no step before the snapshot
                del inner.state[parameter]
        for parameter, entries in self._states.items():
            _put_back(inner.state[parameter], entries)
        for group, entries in zip(inner.param_groups, self._groups, strict=True):
            _put_back(group, entries, but="params")
        if self._scaler is not None:
            self._part.grad_scaler.load_state_dict(copy.deepcopy(self._scaler))


_Entries = dict[str, tuple[Any, Any]]


def _saved_entries(values: dict[str, Any], but: str | None = None) -> _Entries:
    """Return each entry with a copy of what it holds."""
    return {key: (value, copy.deepcopy(value)) for key, value in values.items() if key != but}


def _put_back(values: dict[str, Any], entries: _Entries, but: str | None = None) -> None:
    for key in [key for key in values if key != but and key not in entries]:
        del values[key]
    for key, (value, saved) in entries.items():
        if isinstance(value, torch.Tensor):
            value.copy_(saved)  # in place, since other objects may refer to the tensor
            values[key] = value
        else:
            values[key] = copy.deepcopy(saved)


def _owned(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, Any]]:
    """Yield each parameter of which this rank owns a part, with its range when flattened."""
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


def _step_and_state(shard: _Shard) -> tuple[int, dict[str, Any]]:
    """Return how many steps Adam has taken with this parameter, and its state.

    The steps are 0 while there is no second moment. torch keeps them with each parameter, Apex and
    Transformer Engine with the group.
    """
    state = shard.optimizer._get_main_param_and_optimizer_states(shard.parameter)
    step = state["step"] if "step" in state else _group(shard).get("step", 0)
    return (int(step) if "exp_avg_sq" in state else 0), state


def _group(shard: _Shard) -> dict[str, Any]:
    index, _ = shard.optimizer.model_param_group_index_map[shard.parameter]
    group: dict[str, Any] = shard.optimizer.optimizer.param_groups[index]
    return group


def _second_moment(shard: _Shard) -> torch.Tensor:
    step, state = _step_and_state(shard)
    if step == 0:
        raise RuntimeError("the optimizer has no second moment before its first step")
    moment: torch.Tensor = state["exp_avg_sq"] / (1.0 - _group(shard)["betas"][1] ** step)
    return moment


_LAYER = re.compile(r"(?P<layers>.*\blayers)\.(?P<index>\d+)$")


def global_names(model: list[DistributedDataParallel]) -> dict[torch.nn.Parameter, str]:
    """Return each parameter of this rank's chunks with its global name, the same on any layout.

    That is GPTModel's name, without the wrappers' ``module.``, and with layers counted over all
    pipeline stages from 0: ``decoder.layers.11.mlp.linear_fc1.weight``.
    """
    names = {}
    for chunk in unwrap_model(model):
        numbers = {
            prefix: f"{match['layers']}.{module.layer_number - 1}"
            for prefix, module in chunk.named_modules()
            if (match := _LAYER.match(prefix)) and hasattr(module, "layer_number")
        }
        for name, parameter in chunk.named_parameters():
            local = next((p for p in numbers if name.startswith(f"{p}.")), None)
            names[parameter] = name if local is None else numbers[local] + name[len(local) :]
    return names


def check_selection(
    model: list[DistributedDataParallel], parameters: ParametersConfig, parallel: Parallel
) -> None:
    """Refuse a selection without parameters, and a pattern that matches none. Collective.

    Raises:
        InputError: on every rank, naming the pattern.
    """
    names = [name for p, name in global_names(model).items() if param_is_not_shared(p)]
    patterns = [
        *(("include", pattern) for pattern in parameters.include),
        *(("exclude", pattern) for pattern in parameters.exclude),
    ]
    selections = [
        parameters,
        *(ParametersConfig(include=[pattern]) for _, pattern in patterns),
    ]
    matches = torch.tensor([sum(map(s.selects, names)) for s in selections])
    selected, *matched = sum_over_ranks(matches, parallel).tolist()
    for (field, pattern), count in zip(patterns, matched, strict=True):
        if not count:
            raise InputError(
                f"probe.parameters.{field}: {pattern} matches no parameter; names are like "
                f"{names[0]} and {names[-1]}"
            )
    if not selected:
        raise InputError(
            "probe.parameters.exclude: every included parameter is excluded; leave some to "
            "measure influence on"
        )
