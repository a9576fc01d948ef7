"""One forward-backward pass over micro-batches, and one optimizer step."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.rng import rng_state, same_rng_state, set_rng_state
from megatron_tikmix.megatron.samples import DocumentBoundaries, Sample

_log = logging.getLogger(__name__)

LossSums = list[dict[str, torch.Tensor]]
"""The schedule's results: one dict for each micro-batch, on the last pipeline stage only."""


def forward_step(
    data_iterator: Iterator[Sample],
    model: torch.nn.Module,
    boundaries: DocumentBoundaries | None = None,
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict]]]:
    """Return the model's output and its loss function, as megatron-core's `forward_step_func`.

    Args:
        boundaries: the effect of document boundaries inside a sample; bind it beforehand.
    """
    device = next(model.parameters()).device
    batch = {k: v.to(device, non_blocking=True) for k, v in next(data_iterator).items()}
    if boundaries is not None:
        batch = boundaries.applied(batch)
    mask = batch.get("attention_mask")
    losses = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    return losses, partial(loss_sums, batch["loss_mask"], batch.get("domain"))


def loss_sums(
    loss_mask: torch.Tensor, domain: torch.Tensor | None, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Return a micro-batch's summed loss and unmasked tokens, as megatron-core expects them.

    Sums, not means: megatron-core divides by the tokens of the whole global batch
    (`calculate_per_token_loss`), so that all tokens have the same weight, whatever the masks.

    Args:
        loss_mask: 1 where a token counts, float (micro_batch_size, sequence_length).
        domain: each row's domain, int64 (micro_batch_size,); None where it is not needed.
        losses: nats per token, (micro_batch_size, sequence_length).
    """
    losses = losses.float() * loss_mask
    rows = {"loss": losses.detach().sum(dim=1), "tokens": loss_mask.sum(dim=1)}
    if domain is not None:
        rows["domain"] = domain
    return losses.sum(), loss_mask.sum().to(torch.int), rows


@dataclass
class ForwardBackward:
    """Runs micro-batches through megatron-core's schedule for this layout."""

    model: list[DistributedDataParallel]
    parallel: Parallel
    micro_batch_size: int
    sequence_length: int
    forward_step_func: Callable[..., Any] = forward_step
    _schedule: Callable[..., LossSums] = field(init=False)

    def __post_init__(self) -> None:
        config = self.model[0].config
        self._schedule = get_forward_backward_func(
            pp_size=self.parallel.groups.pp.size(),
            vp_size=config.virtual_pipeline_model_parallel_size,
        )

    @property
    def microbatch_multiple(self) -> int:
        """The number of which the micro-batches of a pass must be a multiple."""
        return self.parallel.groups.pp.size() if len(self.model) > 1 else 1

    def __call__(
        self,
        micro_batches: Iterator[Sample] | list[Sample],
        num_microbatches: int,
        *,
        forward_only: bool = False,
    ) -> LossSums:
        """Run forward and, unless `forward_only`, backward passes, and reduce the gradients.

        Afterwards each parameter's `main_grad` holds this rank's shard of the mean gradient
        per unmasked token, over all micro-batches and data-parallel ranks.
        """
        # An interleaved schedule reads the inputs once for each chunk.
        chunks = len(self.model)
        if chunks > 1:
            batches = list(itertools.islice(micro_batches, num_microbatches))
            iterator: Any = [iter(batches) for _ in range(chunks)]
        else:
            iterator = iter(micro_batches)
        result: LossSums = self._schedule(
            forward_step_func=self.forward_step_func,
            data_iterator=iterator,
            model=self.model if chunks > 1 else self.model[0],
            num_microbatches=num_microbatches,
            seq_length=self.sequence_length,
            micro_batch_size=self.micro_batch_size,
            forward_only=forward_only,
        )
        return result


def connect(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Set the hooks by which megatron-core's schedule scales, syncs and reduces gradients."""
    config = model[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if model[0].ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
        if model[0].ddp_config.align_param_gather:
            starts = [chunk.start_grad_sync for chunk in model]
            config.grad_sync_func = starts if len(model) > 1 else starts[0]


@contextmanager
def summed_gradients(model: list[DistributedDataParallel], *, reduced: bool) -> Iterator[None]:
    """Let a pass sum gradients over tokens, where training takes their mean.

    Enter it after emptying the gradient buffers. All tokens have the same weight, whatever their
    weight in training. The caller must check that gradients are finite: megatron-core's own checks,
    which would end the job, are off.

    Args:
        reduced: sum over data-parallel ranks too, into this rank's shard, as in training. False:
            each data-parallel rank keeps the whole gradient of its own micro-batches. Reductions
            over tensor- and pipeline-parallel ranks (norms under sequence parallelism, tied
            embeddings) are always made.
    """
    config = model[0].config
    with ExitStack() as stack:
        for chunk in model:
            for place, values in _for_sums(chunk):
                stack.enter_context(_set(place, **values))
        stack.enter_context(_set(config, finalize_model_grads_func=_finalize_sums))
        if not reduced:
            stack.enter_context(_set(config, no_sync_func=None, grad_sync_func=None))
            for chunk in model:
                stack.enter_context(chunk.no_sync())  # nothing is sent during the backward pass,
                chunk.finish_grad_sync = _nothing  # and nothing after it
                stack.callback(delattr, chunk, "finish_grad_sync")
        yield


def _finalize_sums(
    model: list[DistributedDataParallel], num_tokens: torch.Tensor | None, **groups: Any
) -> None:
    finalize_model_grads(model, None, **groups)  # without tokens it does not divide by them


def _for_sums(chunk: DistributedDataParallel) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield objects of a chunk with the attributes that they need while gradients are summed.

    Foreign loops may take means: over tokens and micro-batches in the schedule (without
    `calculate_per_token_loss`), and over ranks in the gradient buckets.
    """
    yield chunk.config, {"calculate_per_token_loss": True}
    off = ("check_for_nan_in_grad", "check_for_large_grads", "average_in_collective")
    yield chunk.ddp_config, dict.fromkeys(off, False)
    for group in chunk.bucket_groups:
        for bucket in group.buckets:
            yield bucket, {"gradient_scaling_factor": 1.0}


@contextmanager
def _set(place: Any, **values: Any) -> Iterator[None]:
    """Set these attributes for the length of the block, then restore them."""
    own = vars(place)
    former = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(former)


def _nothing(**arguments: Any) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """The results of one optimizer step.

    Attributes:
        loss_sums: empty except on the last pipeline stage.
        grad_norm: of the mean gradient, before clipping; NaN if the gradient was not finite.
        skipped: whether nothing was updated.
        said: the largest of what each rank said, for each number of `say`.
    """

    loss_sums: LossSums
    grad_norm: float
    learning_rate: float
    skipped: bool
    said: list[int]


def zero_gradients(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Empty the gradient buffers before a new accumulation."""
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def train_step(
    forward_backward: ForwardBackward,
    micro_batches: Iterator[Sample],
    num_microbatches: int,
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    global_batch_size: int,
    say: Callable[[], Sequence[int]] = tuple,
) -> StepResult:
    """Train on one global batch: gradients, optimizer step, learning-rate step. Collective.

    If a gradient is not finite on any rank, no rank updates anything.

    The host waits for the device where megatron-core does, for the norm of the gradient, and
    nowhere else: what ranks tell each other travels on the device before that.

    Args:
        say: what this rank has to tell the others, called once; the same count on each rank.
    """
    model, device = forward_backward.model, forward_backward.parallel.device
    zero_gradients(model, optimizer)
    sums = forward_backward(micro_batches, num_microbatches)
    learning_rate = optimizer.param_groups[0]["lr"]
    said = SaidByRanks([gradient_is_lost(model), *say()], device)
    spread_loss(said.largest[0], model)
    updated, grad_norm = step_unless_lost(optimizer)
    if updated:
        scheduler.step(increment=global_batch_size)
    return StepResult(sums, grad_norm, learning_rate, not updated, said.read()[1:])


class SaidByRanks:
    """The largest value that any rank has for each of a few numbers, without waiting. Collective.

    Args:
        values: not negative; numbers, or tensors of one element on `device`.
    """

    def __init__(self, values: Sequence[int | torch.Tensor], device: torch.device) -> None:
        self.largest = torch.zeros(len(values), dtype=torch.int32, device=device)
        for place, value in zip(self.largest, values, strict=True):
            place.copy_(value) if isinstance(value, torch.Tensor) else place.fill_(value)
        dist.all_reduce(self.largest, op=dist.ReduceOp.MAX)
        on_gpu = device.type == "cuda"
        self._on_host = torch.empty(len(values), dtype=torch.int32, pin_memory=on_gpu)
        self._on_host.copy_(self.largest, non_blocking=True)
        self._copied = torch.cuda.Event() if on_gpu else None
        if self._copied is not None:
            self._copied.record()

    def read(self) -> list[int]:
        """Return the values; waits for nothing if the host has waited for a later result."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._on_host.tolist()


def gradient_is_lost(model: list[DistributedDataParallel]) -> torch.Tensor:
    """Return whether this rank's gradient buffers hold anything that is not finite: bool ()."""
    # One reading pass, and no copy: NaN and infinity both end up in the largest entry.
    largest = [
        torch.linalg.vector_norm(buffer.grad_data, ord=torch.inf)
        for chunk in model
        for buffer in chunk.buffers + chunk.expert_parallel_buffers
    ]
    if not largest:  # nothing of this rank is trained
        return torch.zeros((), dtype=torch.bool, device=next(model[0].parameters()).device)
    return ~torch.isfinite(torch.stack(largest)).all()


def spread_loss(lost: torch.Tensor, model: list[DistributedDataParallel]) -> None:
    """Make the norm of the gradient NaN on every rank if `lost`, so that each skips the update.

    A fault in one tensor-parallel copy of a parameter, or in a copy of a tied embedding, is in no
    norm of its own.

    Args:
        lost: not 0 if any rank's gradient is lost; one element, on the device.
    """
    firsts = [
        parameter.main_grad.view(-1)[:1]
        for chunk in model
        for parameter in chunk.parameters()
        if parameter.requires_grad
    ]
    nothing = torch.zeros(1, device=lost.device)
    added = torch.where(lost > 0, torch.full_like(nothing, math.nan), nothing)
    if firsts:
        torch._foreach_add_(firsts, [added.to(first.dtype) for first in firsts])


def step_unless_lost(optimizer: MegatronOptimizer) -> tuple[bool, float]:
    """megatron-core's step, left out where the norm of the gradient is not finite. Collective.

    Returns:
        whether it updated, and the norm, NaN if it is not finite.
    """
    norms: list[float] = []

    def noted(norm_of: Callable[..., float]) -> Callable[..., float]:
        def norm(*arguments: Any) -> float:
            norms.append(norm_of(*arguments))
            return norms[-1]

        return norm

    update = optimizer.step_with_ready_grads

    def update_if_finite() -> bool:
        if not norms:  # megatron-core asks for none where it clips none
            norms.append(optimizer.get_grad_norm())
        return math.isfinite(norms[-1]) and bool(update())

    with _set(
        optimizer,
        get_grad_norm=noted(optimizer.get_grad_norm),
        clip_grad_norm=noted(optimizer.clip_grad_norm),
        step_with_ready_grads=update_if_finite,
    ):
        updated = bool(optimizer.step()[0])
    grad_norm = norms[-1] if norms else math.nan
    return updated, grad_norm if math.isfinite(grad_norm) else math.nan


@contextmanager
def gathered_parameters(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Gather the parameters, which `overlap_param_gather` leaves to the next forward pass.

    Where a loop has switched that off for a while, it has gathered them, and is left alone.
    """
    gathers_late = [
        chunk
        for chunk in model
        if chunk.ddp_config.overlap_param_gather and chunk.remove_forward_pre_hook_handles
    ]
    for chunk in gathers_late:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in gathers_late:
            chunk.enable_forward_pre_hook()


@contextmanager
def evaluation_mode(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Switch dropout off and gather parameters; restore every module's mode at the end.

    No random numbers are drawn, so training continues unaffected.
    """
    with gathered_parameters(model):
        modes = [(module, module.training) for chunk in model for module in chunk.modules()]
        for chunk in model:
            chunk.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


_CHANCE = ("hidden_dropout", "attention_dropout", "embedding_dropout")
"""Attributes of modules that are probabilities of dropout, besides the `p` of torch's Dropout:
megatron-core's layers and Transformer Engine's kernels read theirs at each pass."""


@contextmanager
def without_chance(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Leave the model in the mode of training with all chance off, and gather parameters.

    A pass has then the same result as in evaluation mode, and is computed as in training:
    megatron-core recomputes activations in training mode only, and Transformer Engine's attention
    keeps what its backward pass needs. It draws no random number; a module that does all the same,
    by dropout of its own, is named in a warning, and the random streams are put back.
    """
    before = rng_state()
    try:
        with ExitStack() as stack:
            stack.enter_context(gathered_parameters(model))
            for chunk in model:
                stack.enter_context(_set(chunk.config, moe_input_jitter_eps=None))
                for module in chunk.modules():
                    off = {n: 0.0 for n in _CHANCE if isinstance(vars(module).get(n), float)}
                    if isinstance(module, torch.nn.Dropout):
                        off["p"] = 0.0
                    if off:
                        stack.enter_context(_set(module, **off))
            yield
    finally:
        if not same_rng_state(before, rng_state()):
            set_rng_state(before)
            modules = [module for chunk in model for module in chunk.modules()]
            # Transformer Engine's attention moves its stream on also where nothing is drawn.
            if not any(type(m).__module__.startswith("transformer_engine") for m in modules):
                _log.warning(
                    "a module of the model draws random numbers when its dropout is 0, so that "
                    "influence is noisier than it need be; give it dropout by torch.nn.Dropout"
                )


def loss_and_tokens(sums: LossSums, parallel: Parallel) -> torch.Tensor:
    """Return the summed loss and unmasked tokens of this rank's micro-batches.

    The result is float64 (2,), on the device. It is 0 except on one rank of each model replica, so
    that a sum over ranks counts each once.
    """
    total = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    for rows in sums if parallel.reports_loss else ():
        total += torch.stack([rows["loss"].double().sum(), rows["tokens"].double().sum()])
    return total
