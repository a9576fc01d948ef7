"""A rehearsal: one rank's training steps and probe at real size, on the stand-in device.

:func:`megatron_tikmix.rehearsal.stand_in.install` must have been called before this is imported.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend

from megatron_tikmix.config import RunConfig
from megatron_tikmix.measure.boundary_cost import BoundaryCost, boundary_cost
from megatron_tikmix.measure.probe import InfluenceProbe, ProbeData
from megatron_tikmix.measure.probe_plan import ProbeSizes, Trained, plan_probe_of
from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.samples import DocumentBoundaries, Sample, stack
from megatron_tikmix.megatron.step import ForwardBackward, train_step
from megatron_tikmix.rehearsal import stand_in
from megatron_tikmix.rehearsal.stand_in import Collective, Part, StandIn
from megatron_tikmix.training.build import build_training
from megatron_tikmix.training.plan import MemoryPlan, plan_memory

STEP = "training step"
OPENED = "probe: validation gradients"
ADDED = "probe: sub-batches"
PHASES = (STEP, OPENED, ADDED)

_DOMAINS, _SUB_BATCHES = 2, 2  # measured in the rehearsal


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one group in a phase.

    Attributes:
        group: megatron-core's name of it, `world`, or `host` for those that use no accelerator.
        ranks: how many the group has; 1 for a message to one rank.
        nbytes: what this rank hands in, or for a gather gets; of all of them.
    """

    kind: str
    group: str
    ranks: int
    count: int
    nbytes: int


@dataclass(frozen=True)
class Phase:
    """A part of the rehearsal.

    Attributes:
        peak: the most bytes that lived on the device.
        parts: the largest ones of those.
        waits: host waits by place.
        misplaced: places where tensors of the host are handed in beside the device's.
    """

    name: str
    micro_batches: int
    peak: int
    parts: list[Part]
    traffic: list[Traffic]
    waits: dict[str, int]
    misplaced: dict[str, int]


@dataclass(frozen=True)
class Rehearsal:
    """What one rank of a job would do and need.

    Attributes:
        place: its ranks in the groups tp, pp and dp.
        micro_batches_of_step: as configured; in the rehearsal a step has no more than what the
            pipeline needs to be full, twice.
        sub_batches: those that this rank passed.
        error: what broke it off, in one sentence; None if nothing did.
        plan: what `--dry_run` says of the fullest rank.
        cost: what it says of a boundary, where `device_name` is set.
    """

    rank: int
    world_size: int
    place: dict[str, int]
    attention: str
    phases: list[Phase]
    micro_batches_of_step: int
    sub_batches: int
    error: str | None
    plan: MemoryPlan
    cost: BoundaryCost | None

    @property
    def peak(self) -> int:
        """The most bytes that lived on the device."""
        return max((phase.peak for phase in self.phases), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {**asdict(self), "peak": self.peak, "planned": self.plan.total}


def rehearse(
    config: RunConfig, world_size: int, rank: int, vocab_size: int, domains: int
) -> Rehearsal:
    """Build the model at its size, train, and measure influence, on one rank of a job.

    It reads no data: samples are blank, and two domains stand for all. Once a process.

    Args:
        domains: D; with joint influence a gradient of each is kept.

    Raises:
        InputError: the configuration cannot run on so many ranks.
    """
    config.check(world_size)
    # What `auto` is on an accelerator; Transformer Engine's kernels cannot be rehearsed.
    config.model.transformer_impl = "local"
    if config.model.attention_backend is AttnBackend.auto:
        config.model.attention_backend = AttnBackend.flash
    parallel = join(config, world_size, rank)
    watched = StandIn()
    error = None
    try:
        with watched:
            _act(watched, config, parallel, vocab_size, domains)
    except (RuntimeError, NotImplementedError) as failure:
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    groups = parallel.groups
    tasks = len(config.deciding_tasks)
    rows = tasks + (domains if config.remix.influence == "joint" else 0)
    sizes = ProbeSizes(domains=domains, tasks=tasks, samples=[config.probe.task_samples] * rows)
    trained = Trained.of(config, world_size, vocab_size)
    probe = plan_probe_of(trained, config, sizes)
    cost = None
    if probe is not None and config.device_name is not None:
        cost = boundary_cost(config.device_name, config, world_size, trained, probe)
    if config.model.uses_torch_attention:
        attention = "torch's, keeps no scores"
    else:
        attention = "megatron-core's, keeps scores"
    return Rehearsal(
        rank=rank,
        world_size=world_size,
        place={name: getattr(groups, name).rank() for name in ("tp", "pp", "dp")},
        attention=attention,
        phases=_phases(watched, parallel, _micro_batches(config, world_size)[0]),
        micro_batches_of_step=_micro_batches(config, world_size)[1],
        sub_batches=(
            _DOMAINS if config.probe.data_parallel_mode == "replicated" else _DOMAINS * _SUB_BATCHES
        ),
        error=error,
        plan=plan_memory(
            config, world_size, vocab_size, 0 if probe is None else probe.gradient_bytes
        ),
        cost=cost,
    )


def join(config: RunConfig, world_size: int, rank: int) -> Parallel:
    """Join a job of that size as the only rank there is, and lay its ranks out."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    stand_in.begin(rank, world_size)
    model = config.model
    parallel_state.initialize_model_parallel(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    return Parallel(
        rank,
        world_size,
        stand_in.DEVICE,
        ProcessGroupCollection.use_mpu_process_groups(),
        dist.new_group(),
        dist.new_group(),
    )


def _act(
    watched: StandIn, config: RunConfig, parallel: Parallel, vocab_size: int, domains: int
) -> None:
    """Build, train two steps, of which the second is watched, and probe."""
    switches = {
        name: getattr(config.data, name)
        for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
    }
    boundaries = DocumentBoundaries(eod=0, **switches)
    forward_backward, optimizer, scheduler = build_training(
        config, vocab_size, boundaries, parallel
    )
    count, _ = _micro_batches(config, parallel.world_size)
    for phase in ("first step", STEP):  # the first one makes the optimizer's state
        with watched.phase(phase):
            train_step(
                forward_backward,
                _blank_batches(config, count),
                count,
                optimizer,
                scheduler,
                config.train.global_batch_size,
            )
    if not config.decides:
        return
    shards = OptimizerShards(
        forward_backward.model,
        optimizer,
        parallel.groups,
        vocab_size,
        config.probe.parameters.selects,
    )
    data = _probe_data(config, forward_backward, domains)
    probe = InfluenceProbe(forward_backward, optimizer, shards, data, config.probe)
    with watched.phase(OPENED):
        opened = probe.open(1)
        opened.__enter__()
    # Replicated sub-batches are dealt out: so many that this rank has some, whichever it is.
    replicated = config.probe.data_parallel_mode == "replicated"
    count = parallel.data_parallel_size if replicated else _SUB_BATCHES
    with watched.phase(ADDED):
        probe.add(np.full(_DOMAINS, count))
        opened.__exit__(None, None, None)


def _micro_batches(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Micro-batches of a step in the rehearsal, and as configured."""
    per_pass = config.train.micro_batch_size * config.data_parallel_size(world_size)
    whole = config.train.global_batch_size // per_pass
    return min(whole, 2 * config.model.pipeline_model_parallel_size), whole


def _blank_sample(length: int) -> Sample:
    return {
        **{name: torch.zeros(length, dtype=torch.int64) for name in ("tokens", "labels")},
        "position_ids": torch.arange(length),
        "loss_mask": torch.ones(length),
    }


def _blank_batches(config: RunConfig, count: int) -> Iterator[Sample]:
    sample = _blank_sample(config.data.sequence_length)
    sample["domain"] = torch.zeros((), dtype=torch.int64)
    for _ in range(count):
        yield stack([sample] * config.train.micro_batch_size)


class _BlankStream:
    """Samples that hold nothing, as many as are asked for."""

    def __init__(self, length: int, samples_per_epoch: int) -> None:
        self._sample = _blank_sample(length)
        self.samples_per_epoch = samples_per_epoch

    def __getitem__(self, index: int) -> Sample:
        return self._sample

    def padding(self) -> Sample:
        return self._sample


def _probe_data(config: RunConfig, forward_backward: ForwardBackward, domains: int) -> ProbeData:
    """The probe's data with blank samples: all rows that are kept, and two domains."""
    parallel, length = forward_backward.parallel, config.data.sequence_length
    rows = list(config.deciding_tasks)
    if config.remix.influence == "joint":
        rows += [f"domain {j}" for j in range(domains)]
    # A task has as many micro-batches as fill the pipeline twice: more cost time and no memory.
    stages = 2 * config.model.pipeline_model_parallel_size
    enough = stages * config.train.micro_batch_size * parallel.data_parallel_size
    stream: Any = _BlankStream(length, min(config.probe.task_samples, enough))
    tasks: list[Any] = [SimpleNamespace(name=name, decide=stream) for name in rows]
    return ProbeData(
        lambda domain, stage: stream,
        [f"domain {j}" for j in range(_DOMAINS)],
        tasks,
        sub_batch_samples=config.probe.sub_batch_samples,
        task_samples=config.probe.task_samples,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=parallel.data_parallel_rank,
        data_parallel_size=parallel.data_parallel_size,
        microbatch_multiple=forward_backward.microbatch_multiple,
    )


def _phases(watched: StandIn, parallel: Parallel, micro_batches: int) -> list[Phase]:
    names = _group_names(parallel)
    return [
        Phase(
            name=name,
            micro_batches=micro_batches if name == STEP else 0,
            peak=watched.peak(name),
            parts=watched.fullest(name),
            traffic=_traffic([c for c in watched.collectives if c.phase == name], names),
            waits={place: n for (phase, place), n in watched.waits.items() if phase == name},
            misplaced={at: n for (phase, at), n in watched.misplaced.items() if phase == name},
        )
        for name in PHASES
        if watched.peak(name)
    ]


def _group_names(parallel: Parallel) -> dict[tuple[int, ...], str]:
    names = {tuple(range(parallel.world_size)): "world"}
    for name in ("embd", "mp", "dp", "pp", "tp"):  # the later, the better known
        group = getattr(parallel.groups, name, None)
        if isinstance(group, dist.ProcessGroup):
            names[tuple(dist.get_process_group_ranks(group))] = name
    return names


def _traffic(collectives: list[Collective], names: dict[tuple[int, ...], str]) -> list[Traffic]:
    counts: Counter[tuple[str, str, int]] = Counter()
    sizes: Counter[tuple[str, str, int]] = Counter()
    for each in collectives:
        group = names.get(each.ranks, f"rank {each.ranks[0]}" if len(each.ranks) == 1 else "other")
        key = (each.kind, "host" if each.on_host else group, len(each.ranks))
        counts[key] += 1
        sizes[key] += each.nbytes
    return [
        Traffic(kind, group, ranks, counts[kind, group, ranks], nbytes)
        for (kind, group, ranks), nbytes in sizes.most_common()
    ]
