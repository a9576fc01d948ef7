"""A device that has shapes and no numbers, and process groups that have no other ranks.

Tensors on torch's ``meta`` device stand for those of an accelerator, and torch's ``fake`` process
groups for its collectives. Everything that runs inside :class:`StandIn` is watched:

- the bytes that live on the device, and what they were when they were most;
- collectives, by group, in their order;
- *host waits*: places where the host needs a number that the device has not computed yet;
- tensors of the host among those of the device, where an accelerator would refuse them.

A number that is read is made up: 1.0 of floats, True of flags, and 0 of integers, as counts of what
went wrong are integers here.

:func:`install` must come before the first import of ``megatron.core``; it changes this process for
good, so that a process rehearses and does nothing else.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tikmix.megatron import cpu

DEVICE = torch.device("meta")


@dataclass(frozen=True)
class Part:
    """Tensors of one kind that live together.

    Attributes:
        shape, dtype: of each.
        place: where they were made: a file and line, and the operator.
        count: how many.
        nbytes: of all of them.
    """

    shape: tuple[int, ...]
    dtype: str
    place: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Collective:
    """One call of a collective, or of a send or receive.

    Attributes:
        kind: its name in torch, without underscores: `allreduce`, `reduce_scatter_base`, `send`.
        ranks: global ranks of the group; of a send or receive, the other rank.
        nbytes: of what this rank hands in, or for a gather gets.
        on_host: whether it is of tensors of the host.
        phase: what was going on.
    """

    kind: str
    ranks: tuple[int, ...]
    nbytes: int
    on_host: bool
    phase: str


class StandIn(TorchDispatchMode):
    """Watches one rank of a job on the device that stands in for an accelerator.

    ::

        with StandIn() as watched, watched.phase("step"):
            ...
        watched.peak("step"), watched.waits, watched.collectives

    Args:
        heard: what rank 0 broadcast when it was watched, its `said`; for the other ranks.
    """

    def __init__(self, heard: Sequence[Any] = ()) -> None:
        super().__init__()
        self.said: list[Any] = []
        """What this rank broadcast from the host, if it is rank 0, in its order."""
        self._heard = iter(heard)
        self.collectives: list[Collective] = []
        self.waits: Counter[tuple[str, str]] = Counter()
        """By phase and place."""
        self.misplaced: Counter[tuple[str, str]] = Counter()
        """By phase and place, where tensors of the host were handed in beside the device's."""
        self.live = 0
        self._phase = "build"
        self._peaks: dict[str, int] = {}
        self._fullest: dict[str, list[Part]] = {}
        self._recorded = 0  # bytes for which the parts were last written down
        self._made: dict[int, tuple[weakref.ref[Any], int, tuple[Any, ...]]] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside is counted under this name; its peak starts at what lives now."""
        outer, self._phase = self._phase, name
        self._peaks[name] = max(self._peaks.get(name, 0), self.live)
        self._recorded = 0
        try:
            yield
        finally:
            self._phase = outer

    def peak(self, phase: str) -> int:
        """The most bytes that lived on the device during a phase."""
        return self._peaks.get(phase, 0)

    def fullest(self, phase: str, most: int = 10) -> list[Part]:
        """The largest parts of what lived when memory was fullest in a phase, to within 1 %."""
        return self._fullest.get(phase, [])[:most]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            self._note_collective(func, args)
            if func.overloadpacket.__name__ == "broadcast_" and args[0][0].device != DEVICE:
                for tensor in args[0]:
                    tensor.copy_(self.broadcast(tensor.clone()))
            return func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.device == DEVICE for tensor in given)
        name = func.overloadpacket.__name__
        if on_device and name == "_local_scalar_dense":
            self._wait()
            return _made_up(given[0]).item()
        if name in ("_to_copy", "copy_"):
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            to_host = _copied_to_host(name, args, kwargs) if on_device else None
            if waits and (to_host is not None or _copied_to_device(name, args, kwargs)):
                self._wait()
            if to_host is not None:
                return to_host
        elif on_device and any(t.device != DEVICE and t.dim() for t in given):
            self.misplaced[self._phase, f"{_place()}: {name}"] += 1
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device == DEVICE:
                self._note_memory(leaf, name)
        return result

    def broadcast(self, value: Any) -> Any:
        """What rank 0 broadcasts: `value` on rank 0; on others what was heard of it, if anything
        was."""
        if dist.get_rank() == 0:
            self.said.append(value)
            return value
        return next(self._heard, value)

    def __enter__(self) -> "StandIn":
        _watching.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        _watching.pop()
        super().__exit__(*exc)

    def _wait(self) -> None:
        self.waits[self._phase, _place()] += 1

    def _note_collective(self, func: Any, args: tuple) -> None:
        kind = func.overloadpacket.__name__.strip("_")
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(groups[0])))
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if kind in ("send", "recv"):
            ranks = (ranks[next(arg for arg in args[2:] if isinstance(arg, int))],)
        self.collectives.append(
            Collective(
                kind=kind,
                ranks=ranks,
                nbytes=max((t.numel() * t.element_size() for t in tensors), default=0),
                on_host=not any(tensor.device == DEVICE for tensor in tensors),
                phase=self._phase,
            )
        )

    def _note_memory(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._made.get(key)
        if known is not None:
            grown = storage.nbytes() - known[1]
            if grown:
                self._made[key] = (known[0], storage.nbytes(), known[2])
                self._add(grown)
            return
        what = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), _place(), name)
        # The Python object of a storage lives as long as the storage.
        reference = weakref.ref(storage, lambda _: self._died(key))
        self._made[key] = (reference, storage.nbytes(), what)
        self._add(storage.nbytes())

    def _died(self, key: int) -> None:
        self.live -= self._made.pop(key)[1]

    def _add(self, nbytes: int) -> None:
        self.live += nbytes
        if self.live <= self._peaks.get(self._phase, 0):
            return
        self._peaks[self._phase] = self.live
        if self.live > 1.01 * self._recorded:
            self._recorded = self.live
            self._fullest[self._phase] = self._parts()

    def _parts(self) -> list[Part]:
        counts: Counter[tuple[Any, ...]] = Counter()
        sizes: Counter[tuple[Any, ...]] = Counter()
        for _, nbytes, what in self._made.values():
            counts[what] += 1
            sizes[what] += nbytes
        return [
            Part(shape, dtype, f"{place}: {name}", counts[shape, dtype, place, name], nbytes)
            for (shape, dtype, place, name), nbytes in sizes.most_common(50)
        ]


_watching: list[StandIn] = []


def _made_up(tensor: torch.Tensor) -> torch.Tensor:
    """What the host reads of a tensor of the device, by its dtype."""
    if tensor.dtype == torch.bool or tensor.is_floating_point():
        return torch.ones(tensor.shape, dtype=tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _copied_to_host(name: str, args: tuple, kwargs: dict) -> torch.Tensor | None:
    """The result of a copy from the device to the host; None if it is another copy."""
    if name == "copy_":
        target, source = args[0], args[1]
        if target.device == DEVICE or source.device != DEVICE:
            return None
        copied: torch.Tensor = target.copy_(_made_up(source))
        return copied
    device = kwargs.get("device")
    if device is None or torch.device(device) == DEVICE or args[0].device != DEVICE:
        return None
    return _made_up(args[0]).to(kwargs.get("dtype") or args[0].dtype)


def _copied_to_device(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether it is a copy from the host to the device, which waits unless it is not to block."""
    if name == "copy_":
        return bool(args[0].device == DEVICE and args[1].device != DEVICE and args[1].dim())
    device = kwargs.get("device")
    return device is not None and torch.device(device) == DEVICE and args[0].device != DEVICE


def _place() -> str:
    """The innermost line outside torch and this file, as `folder/file.py:line`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name and "<" not in name:
            _, package, rest = name.rpartition("/megatron/core/")
            if not package:
                _, package, rest = name.rpartition("/megatron_tikmix/")
            short = package.lstrip("/") + rest if package else name
            return f"{short}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def install() -> None:
    """Have megatron-core and torch.distributed work on the stand-in device, in this process.

    Raises:
        RuntimeError: ``megatron.core`` has been imported already.
    """
    cpu.redirect(DEVICE.type)
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        kept = {k: v for k, v in kwargs.items() if k not in ("timeout", "pg_options")}
        return new_group(*args, **kept | {"backend": "fake"})

    def batch_isend_irecv(operations: list[dist.P2POp]) -> list[Any]:
        return [op.op(op.tensor, op.peer, group=op.group, tag=op.tag) for op in operations]

    @contextlib.contextmanager
    def one_by_one(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield _Done()

    _autocast_as_on_the_cpu()
    vars(torch.nn.functional).update(scaled_dot_product_attention=_attention, rms_norm=_rms_norm)
    # What asks a group for the backend of a device, which these groups do not have.
    vars(dist).update(
        new_group=fake_group,
        batch_isend_irecv=batch_isend_irecv,
        _coalescing_manager=one_by_one,
        all_gather_object=_all_gather_object,
        broadcast_object_list=_broadcast_object_list,
    )
    vars(dist.distributed_c10d).update(_coalescing_manager=one_by_one)


def _autocast_as_on_the_cpu() -> None:
    """Let autocast, which is switched off in places of megatron-core, know the device."""

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            known = "cpu" if device_type == DEVICE.type else device_type
            super().__init__(known, *args, **kwargs)

    def as_on_the_cpu(function: Any) -> Any:
        return lambda device="cpu": function("cpu" if device == DEVICE.type else device)

    vars(torch).update(
        is_autocast_enabled=as_on_the_cpu(torch.is_autocast_enabled),
        get_autocast_dtype=as_on_the_cpu(torch.get_autocast_dtype),
        autocast=Autocast,
    )
    vars(torch.amp.autocast_mode).update(autocast=Autocast)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as in the kernels that torch takes on an accelerator, which keep no scores."""
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output: torch.Tensor = flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return output
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
    return output


class _RMSNorm(torch.autograd.Function):
    """What torch's kernel for an accelerator keeps and makes: no float32 copies of its input."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        scale = values.new_empty(values.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(values, weight, scale)
        return torch.empty_like(values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), None if weight is None else torch.empty_like(weight)


def _rms_norm(
    values: torch.Tensor,
    normalized_shape: Any,
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Norm over the last dimension, as :class:`_RMSNorm`."""
    output: torch.Tensor = _RMSNorm.apply(values, weight)
    return output


class _Done:
    """The handle of collectives that are done."""

    def wait(self, *args: Any) -> bool:
        return True


def _all_gather_object(found: list[Any], value: Any, group: Any = None) -> None:
    dist.all_reduce(torch.zeros(1), group=group)  # counted as one collective of the host
    found[:] = [value] * len(found)


def _broadcast_object_list(
    values: list[Any], src: int = 0, group: Any = None, **kwargs: Any
) -> None:
    dist.all_reduce(torch.zeros(1), group=group)
    for watched in _watching[-1:]:
        values[:] = watched.broadcast(list(values))


def begin(rank: int, world_size: int) -> None:
    """Join a job of that size, as the only rank there is."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
