"""Build everything, train, tear down."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_tikmix.config import RunConfig, launched_world
from megatron_tikmix.data.blended_dataset import BlendedDataset
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.loader import DataParallelLoader
from megatron_tikmix.data.probe import ProbeData
from megatron_tikmix.errors import InputError
from megatron_tikmix.parallel.collectives import agree_on_input
from megatron_tikmix.parallel.initialize import Parallel, initialize, shut_down
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.checkpoint import Checkpointer
from megatron_tikmix.training.loop import Run, train
from megatron_tikmix.training.model import build_model
from megatron_tikmix.training.optimizer import build_optimizer, build_scheduler
from megatron_tikmix.training.optimizer_state import OptimizerShards
from megatron_tikmix.training.plan import describe
from megatron_tikmix.training.probe import InfluenceProbe
from megatron_tikmix.training.record import Recorder
from megatron_tikmix.training.remix import Remixer
from megatron_tikmix.training.state import TrainState
from megatron_tikmix.training.step import ForwardBackward, connect

Made = TypeVar("Made")

# How megatron-core refuses a configuration.
_REFUSALS = (ValueError, AssertionError, RuntimeError, TypeError, ImportError)


def pretrain(config: RunConfig, resolved: str) -> None:
    """Run `config` on the ranks that were launched; `resolved` is its YAML, for the record.

    Raises:
        InputError: the configuration or the data cannot be trained on; nothing was trained.
        TrainingError: training cannot go on.
    """
    rank, _, world_size = launched_world()
    config.check(world_size)
    if config.dry_run:
        if rank == 0:
            print(describe(config, world_size, TrainingData(config)))
        return
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        data = together(parallel, lambda: TrainingData(config))
        recorder = Recorder(config, resolved, parallel)
        together(parallel, recorder.open_folder)
        run = build(config, data, recorder, parallel)
        plan = describe(config, world_size, data)
        together(parallel, lambda: recorder.begin(plan, run.state))
        try:
            train(run)
        finally:
            recorder.close()
        recorder.finish()
    finally:
        shut_down()


def together(
    parallel: Parallel, make: Callable[[], Made], refusals: tuple[type[Exception], ...] = ()
) -> Made:
    """`make()` on every rank, or a refusal on every rank if it is refused on one. Collective.

    Raises:
        InputError: the first rank's refusal.
    """
    made: list[Made] = []
    problem = None
    try:
        made.append(make())
    except InputError as error:
        problem = error
    except refusals as error:
        text = " ".join(str(error).split()) or type(error).__name__
        problem = InputError(f"megatron-core refuses the configuration: {text}")
    agree_on_input(problem, parallel)
    return made[0]


def build(config: RunConfig, data: TrainingData, recorder: Recorder, parallel: Parallel) -> Run:
    """All that a run is made of; brought back to the newest checkpoint in run_dir, if any."""

    def build_training() -> tuple[Any, Any, Any]:
        model = build_model(
            config.model,
            config.ddp,
            vocab_size=data.manifest.vocab_size,
            sequence_length=config.data.sequence_length,
            seed=config.seed,
            parallel=parallel,
        )
        optimizer = build_optimizer(config, model, parallel)
        return model, optimizer, build_scheduler(config, optimizer)

    model, optimizer, scheduler = together(parallel, build_training, _REFUSALS)
    connect(model, optimizer)
    forward_backward = ForwardBackward(
        model, parallel, config.train.micro_batch_size, config.data.sequence_length
    )
    state = TrainState(config.train.train_iters, data.initial_schedule())
    checkpointer = Checkpointer(
        Path(config.run_dir) / "checkpoints",
        model,
        optimizer,
        scheduler,
        parallel,
        fingerprint=fingerprint(config, data),
        keep=config.checkpoint.keep,
    )
    checkpointer.load_latest(state)
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


# What makes two models of the same configuration class different ones.
_ARCHITECTURE = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "share_embeddings_and_output_weights",
    "make_vocab_size_divisible_by",
]


def fingerprint(config: RunConfig, data: TrainingData) -> dict[str, Any]:
    """What a resumed run must have in common with its checkpoint, by configuration field."""
    return {
        "seed": config.seed,
        "data.sequence_length": config.data.sequence_length,
        "train.global_batch_size": config.train.global_batch_size,
        "domains": data.names,
        "tokens": {name: data.manifest.split(name, "train").tokens for name in data.names},
        "vocab_size": data.manifest.vocab_size,
        **{f"model.{name}": getattr(config.model, name) for name in _ARCHITECTURE},
        "model.activation_func": config.model.activation_func.__name__,
    }


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

    shards = OptimizerShards(
        forward_backward.model, optimizer, parallel.groups, data.manifest.vocab_size
    )
    probe_data = ProbeData(
        open_stream,
        data.names,
        data.tasks,
        sub_batch_samples=probe.sub_batch_samples,
        task_samples=probe.task_samples,
        micro_batch_size=config.train.micro_batch_size,
        data_parallel_rank=parallel.data_parallel_rank,
        data_parallel_size=parallel.data_parallel_size,
        microbatch_multiple=forward_backward.microbatch_multiple,
    )
    return Remixer(
        InfluenceProbe(
            forward_backward, optimizer, shards, probe_data, probe, on_progress=recorder.probing
        ),
        parallel,
        remix=config.remix,
        sub_batches=probe.sub_batches,
        seed=probe.seed,
        task_weights={name: task.weight for name, task in config.tasks.items()},
    )
