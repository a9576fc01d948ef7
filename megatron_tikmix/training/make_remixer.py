"""Puts a Remixer together: streams, probe, rollouts and decider, from what trains and its data."""

from collections.abc import Callable
from typing import Any

from megatron_tikmix.config import MixtureSections
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.probe import ProbeData
from megatron_tikmix.data.rollout import RolloutData
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.decide import Decider
from megatron_tikmix.training.optimizer_state import OptimizerShards
from megatron_tikmix.training.parameter_names import check_selection
from megatron_tikmix.training.probe import InfluenceProbe
from megatron_tikmix.training.probe_plan import ProbePlan
from megatron_tikmix.training.remix import Remixer
from megatron_tikmix.training.rollout import Rollouts
from megatron_tikmix.training.step import ForwardBackward

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


def make_remixer(
    config: MixtureSections,
    data: TrainingData,
    forward_backward: ForwardBackward,
    optimizer: Any,
    scheduler: Any,
    plan: ProbePlan,
    *,
    on_probe: Progress = lambda done, total: None,
    on_rollout: Progress = lambda done, total: None,
) -> Remixer:
    """What measures and decides at a boundary. Collective.

    Args:
        optimizer: megatron-core's distributed optimizer.
        scheduler: megatron-core's OptimizerParamScheduler; used by rollouts only.
        on_probe, on_rollout: told of the passes of a probe, and of the rollouts.

    Raises:
        InputError: `probe.parameters` selects nothing.
    """
    parallel, probe = forward_backward.parallel, config.probe

    length = config.data.sequence_length
    # One more, from which squared gradients are taken.
    probed = (plan.sub_batches + 1) * probe.sub_batch_samples
    if plan.most_tokens is not None:
        probed = max(probed, plan.most_tokens // length)
    rolled_out = max(config.rollout.iters, config.audit.iters) * config.train.global_batch_size

    def probe_stream(domain: int, stage: int) -> DomainStream:
        name = data.names[domain]
        seed = derived_seed(probe.seed, stage, name)
        return data.stream(name, seed, length, first_samples=probed)

    def rollout_stream(domain: int, seed: int) -> DomainStream:
        name = data.names[domain]
        return data.stream(name, derived_seed(seed, name), length, first_samples=rolled_out)

    check_selection(forward_backward.model, probe.parameters, parallel)
    shards = OptimizerShards(
        forward_backward.model,
        optimizer,
        parallel.groups,
        data.manifest.vocab_size,
        probe.parameters.selects,
    )
    probe_data = ProbeData(
        probe_stream,
        data.names,
        data.probed_tasks,
        sub_batch_samples=probe.sub_batch_samples,
        task_samples=probe.task_samples,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=parallel.data_parallel_rank,
        data_parallel_size=parallel.data_parallel_size,
        microbatch_multiple=forward_backward.microbatch_multiple,
    )
    rollouts = None
    if config.needs_rollouts:
        rollout_data = RolloutData(
            rollout_stream,
            data.names,
            [task.name for task in data.deciding_tasks],
            probe_data.of_task,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
        )
        rollouts = Rollouts(
            forward_backward, optimizer, scheduler, rollout_data, on_progress=on_rollout
        )
    return Remixer(
        InfluenceProbe(
            forward_backward, optimizer, shards, probe_data, probe, on_progress=on_probe
        ),
        build_decider(config, data),
        rollouts,
        parallel,
        config,
        plan,
    )


def build_decider(config: MixtureSections, data: TrainingData) -> Decider:
    """What decides at a boundary."""
    return Decider(
        config.remix,
        seed=config.probe.seed,
        task_weights={name: task.weight for name, task in config.deciding_tasks.items()},
        samples_per_epoch={stream.name: stream.samples_per_epoch for stream in data.streams},
    )
