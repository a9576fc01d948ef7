"""Build all parts of a run, train, and shut down."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tikmix.config import RunConfig, launched_world
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.dataset import BlendedDataset, DataParallelLoader
from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.measure.probe_plan import plan_probe
from megatron_tikmix.measure.remixer import Remixer, load_data
from megatron_tikmix.megatron.collectives import left_alone, make_on_all_ranks
from megatron_tikmix.megatron.groups import Parallel, initialize, shut_down
from megatron_tikmix.megatron.model import build_model, kernels_in_use
from megatron_tikmix.megatron.optimizer import build_optimizer, build_scheduler
from megatron_tikmix.megatron.samples import DocumentBoundaries
from megatron_tikmix.megatron.step import ForwardBackward, connect, forward_step
from megatron_tikmix.training.checkpoint import Checkpointer, fingerprint
from megatron_tikmix.training.loop import Run, train
from megatron_tikmix.training.plan import describe
from megatron_tikmix.training.record import Recorder
from megatron_tikmix.training.state import TrainState
from megatron_tikmix.training.stopping import SignalWatch, Stopping

# The exceptions by which megatron-core refuses a configuration.
_REFUSALS = (ValueError, AssertionError, RuntimeError, TypeError, ImportError)


def pretrain(config: RunConfig, resolved: str) -> None:
    """Train `config` on the launched ranks; `resolved` is its YAML, written to the run's folder.

    SIGTERM, SIGINT, `train.exit_interval` and `train.exit_duration_in_mins` end the run early, with
    a checkpoint from which a run in the same directory resumes.

    Raises:
        InputError: the configuration or the data cannot be trained on; nothing was trained.
        TrainingError: training cannot continue.
    """
    started = time.monotonic()
    rank, _, world_size = launched_world()
    config.check(world_size)
    if config.dry_run:
        if rank == 0:
            print(describe(config, world_size, load_data(config)))
        return
    parallel = initialize(
        config.model, config.seed, config.timeout_minutes, config.decision_timeout_minutes
    )
    try:
        data = make_on_all_ranks(parallel, lambda: load_data(config))
        recorder = Recorder(config, resolved, parallel)
        make_on_all_ranks(parallel, recorder.open_folder)
        run = build(config, data, recorder, parallel)

        def begin() -> None:
            # Only the main rank prints the plan, and timing a matrix product takes a while.
            plan = ""
            if parallel.is_main:
                kernels = kernels_in_use(run.forward_backward.model, run.optimizer)
                plan = f"{describe(config, world_size, data)}\n{'kernels':<12} {kernels}"
            recorder.begin(plan, run.state)

        make_on_all_ranks(parallel, begin)
        with SignalWatch() as signals:
            run.stopping = Stopping(config.train, signals, started)
            try:
                train(run)
            except (InputError, TrainingError):
                raise
            except RuntimeError as error:
                alone = left_alone(error, run.place, parallel)
                if alone is None:
                    raise
                raise alone from error
            finally:
                recorder.close()
        recorder.finish(run.stop_reason, run.state.iteration)
    finally:
        shut_down()


def build_training(
    config: RunConfig, vocab_size: int, boundaries: DocumentBoundaries, parallel: Parallel
) -> tuple[ForwardBackward, Any, Any]:
    """Build the model, the optimizer and the learning-rate scheduler. Collective.

    Args:
        vocab_size: of the tokenizer, without padding.
        boundaries: what documents in one sample are to each other.

    Raises:
        InputError: megatron-core refuses the configuration.
    """

    def make() -> tuple[Any, Any, Any]:
        model = build_model(
            config.model,
            config.ddp,
            vocab_size=vocab_size,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            parallel=parallel,
        )
        optimizer = build_optimizer(config, model, parallel)
        return model, optimizer, build_scheduler(config, optimizer)

    model, optimizer, scheduler = make_on_all_ranks(parallel, make, _REFUSALS)
    connect(model, optimizer)
    forward_backward = ForwardBackward(
        model,
        parallel,
        config.train.micro_batch_size,
        config.data.sequence_length,
        partial(forward_step, boundaries=boundaries),
    )
    return forward_backward, optimizer, scheduler


def build_checkpointer(
    config: RunConfig,
    forward_backward: ForwardBackward,
    optimizer: Any,
    scheduler: Any,
    fingerprint: dict[str, Any],
) -> Checkpointer:
    """Return the object that saves and loads the run's checkpoints."""
    return Checkpointer(
        Path(config.run_dir) / "checkpoints",
        forward_backward.model,
        optimizer,
        scheduler,
        forward_backward.parallel,
        fingerprint=fingerprint,
        allow_changed=config.checkpoint.allow_changed,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        async_save=config.checkpoint.async_save,
    )


def build(config: RunConfig, data: TrainingData, recorder: Recorder, parallel: Parallel) -> Run:
    """Build a run, and load the newest checkpoint in run_dir, if any. Collective."""
    # The same on every rank, since it depends only on the configuration and the data's sizes.
    plan = plan_probe(config, parallel.world_size, data)
    forward_backward, optimizer, scheduler = build_training(
        config, data.manifest.vocab_size, data.boundaries, parallel
    )
    state = TrainState(config.train.train_iters, data.initial_schedule())
    checkpointer = build_checkpointer(
        config, forward_backward, optimizer, scheduler, fingerprint(config, data)
    )
    checkpointer.load_latest(state)
    if state.added_domains:
        state.withdraw_empty_stage()
    check_followed(data, state, config)
    return Run(
        config=config,
        parallel=parallel,
        state=state,
        forward_backward=forward_backward,
        optimizer=optimizer,
        scheduler=scheduler,
        streams=data.streams,
        loader=DataParallelLoader(
            BlendedDataset(state.schedule, data.streams, parallel),
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
            num_workers=config.data.num_workers or 0,
        ),
        tasks=data.tasks,
        remixer=None
        if plan is None
        else Remixer.of(
            config,
            data,
            forward_backward,
            optimizer,
            scheduler,
            plan,
            on_probe=recorder.probing,
            on_rollout=recorder.rolling_out,
        ),
        probe_plan=plan,
        boundaries=data.stage_boundaries(config),
        planned=data.planned,
        initial_mixture=data.initial_schedule().mixture(0),
        checkpointer=checkpointer,
        recorder=recorder,
    )


def check_followed(data: TrainingData, state: TrainState, config: RunConfig) -> None:
    """Refuse a given schedule that differs from what the resumed run has trained on so far.

    Raises:
        InputError: names the first stage that differs.
    """
    if data.planned is None or not state.ledger:
        return
    planned, done = data.planned.stages, state.schedule.stages
    for index, stage in enumerate(done):
        same = (
            index < len(planned)
            and planned[index].start_sample == stage.start_sample
            and (planned[index].integer_weights_D == stage.integer_weights_D).all()
        )
        if not same:
            raise InputError(
                f"remix.schedule: stage {index} of {config.remix.schedule} is not the one that the "
                f"checkpoint was trained with, from sample {stage.start_sample} on; keep the "
                f"stages that have begun, or use another run_dir"
            )
    if any(stage.start_sample < state.consumed_samples for stage in planned[len(done) :]):
        raise InputError(
            f"remix.schedule: stage {len(done)} of {config.remix.schedule} begins before the "
            f"checkpoint, which was trained without it; let it begin at sample "
            f"{state.consumed_samples} or later, or use another run_dir"
        )
