"""Build everything, train, tear down."""

from pathlib import Path

from megatron_tikmix.config import RunConfig, launched_world
from megatron_tikmix.data.blended_dataset import BlendedDataset
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.loader import DataParallelLoader
from megatron_tikmix.data.probe import ProbeData
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import MixtureSchedule
from megatron_tikmix.parallel.collectives import agree_on_input
from megatron_tikmix.parallel.initialize import Parallel, initialize, shut_down
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.checkpoint import Checkpointer
from megatron_tikmix.training.loop import Run, train
from megatron_tikmix.training.model import build_model
from megatron_tikmix.training.optimizer import build_optimizer, build_scheduler
from megatron_tikmix.training.optimizer_state import OptimizerShards
from megatron_tikmix.training.plan import describe
from megatron_tikmix.training.record import Recorder
from megatron_tikmix.training.remix import Remixer
from megatron_tikmix.training.state import TrainState
from megatron_tikmix.training.step import ForwardBackward, connect


def pretrain(config: RunConfig, resolved: str) -> None:
    """Run `config` on the ranks that were launched; `resolved` is its YAML, for the record.

    Raises:
        InputError: the configuration or the data cannot be trained on; nothing was written.
    """
    _, _, world_size = launched_world()
    config.check(world_size)
    if config.dry_run:
        print(describe(config, world_size, TrainingData(config)))
        return
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        data = open_together(config, parallel)
        run = build(config, resolved, data, parallel)
        run.recorder.begin(describe(config, world_size, data), run.state)
        try:
            train(run)
        finally:
            run.recorder.close()
        run.recorder.finish()
    finally:
        shut_down()


def open_together(config: RunConfig, parallel: Parallel) -> TrainingData:
    """The data, on every rank or on none: a file missing on one machine stops all. Collective."""
    data, problem = None, None
    try:
        data = TrainingData(config)
    except InputError as error:
        problem = error
    agree_on_input(problem, parallel)
    assert data is not None
    return data


def build(config: RunConfig, resolved: str, data: TrainingData, parallel: Parallel) -> Run:
    """All that a run is made of; brought back to the newest checkpoint in run_dir, if any."""
    model = build_model(
        config.model,
        config.ddp,
        vocab_size=data.manifest.vocab_size,
        sequence_length=config.data.sequence_length,
        seed=config.seed,
        parallel=parallel,
    )
    optimizer = build_optimizer(config, model, parallel)
    scheduler = build_scheduler(config, optimizer)
    connect(model, optimizer)
    forward_backward = ForwardBackward(
        model, parallel, config.train.micro_batch_size, config.data.sequence_length
    )
    schedule = MixtureSchedule(data.names, config.train.global_batch_size, config.seed)
    schedule.append(0, data.initial_mixture.rounded())
    state = TrainState(config.train.train_iters, schedule)
    checkpointer = Checkpointer(
        Path(config.run_dir) / "checkpoints",
        model,
        optimizer,
        scheduler,
        parallel,
        fingerprint={
            "seed": config.seed,
            "data.sequence_length": config.data.sequence_length,
            "train.global_batch_size": config.train.global_batch_size,
            "domains": data.names,
            "tokens": {name: data.manifest.split(name, "train").tokens for name in data.names},
        },
        keep=config.checkpoint.keep,
    )
    checkpointer.load_latest(state)
    recorder = Recorder(config, resolved, parallel)
    return Run(
        config=config,
        parallel=parallel,
        state=state,
        forward_backward=forward_backward,
        optimizer=optimizer,
        scheduler=scheduler,
        streams=data.streams,
        loader=DataParallelLoader(
            BlendedDataset(state.schedule, data.streams),
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
            num_workers=config.data.num_workers,
        ),
        tasks=data.tasks,
        remixer=_build_remixer(config, data, forward_backward, optimizer, recorder),
        checkpointer=checkpointer,
        recorder=recorder,
    )


def _build_remixer(
    config: RunConfig,
    data: TrainingData,
    forward_backward: ForwardBackward,
    optimizer: object,
    recorder: Recorder,
) -> Remixer | None:
    if config.remix.policy == "static" or config.interval_iters is None:
        return None
    parallel, probe = forward_backward.parallel, config.probe

    def open_stream(domain: int, stage: int) -> DomainStream:
        name = data.names[domain]
        seed = derived_seed(probe.seed, stage, name)
        return data.stream(name, seed, config.data.sequence_length)

    return Remixer(
        forward_backward,
        optimizer,
        OptimizerShards(
            forward_backward.model, optimizer, parallel.groups, data.manifest.vocab_size
        ),
        ProbeData(
            open_stream,
            data.names,
            data.tasks,
            sub_batches=probe.sub_batches,
            sub_batch_samples=probe.sub_batch_samples,
            task_samples=probe.task_samples,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
        ),
        remix=config.remix,
        probe=probe,
        task_weights={name: task.weight for name, task in config.tasks.items()},
        on_progress=recorder.probing,
    )
