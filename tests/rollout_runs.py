"""Runs trained for a few steps, and rollouts on them; on one rank or in `run_on_ranks`."""

import gc
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from megatron.core import tensor_parallel

from megatron_tikmix.config import load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.tasks import micro_batches
from megatron_tikmix.measure.rollouts import RolloutData, Rollouts
from megatron_tikmix.megatron.groups import Parallel, initialize, shut_down
from megatron_tikmix.megatron.optimizer import distributed_optimizers
from megatron_tikmix.megatron.step import train_step, zero_gradients
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.training.build import build
from megatron_tikmix.training.loop import Run, train_interval
from megatron_tikmix.training.record import Recorder
from tests.conftest import let_go_of_models

DROPOUT = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}


@contextmanager
def job(settings: dict[str, Any]) -> Iterator[Parallel]:
    """The ranks of this job, laid out as the settings say."""
    config, _ = load_settings(settings)
    parallel = initialize(config.model, config.seed, 5)
    try:
        yield parallel
        torch.distributed.barrier()  # none leaves while another still listens to it
    finally:
        shut_down()
        let_go_of_models()


def load_settings(settings: dict[str, Any]) -> tuple[Any, str]:
    path = Path(f"{settings['run_dir']}-{os.getpid()}.yaml")  # each rank writes its own
    path.write_text(yaml.safe_dump(settings))
    return load_config([str(path)])


def trained(settings: dict[str, Any], parallel: Parallel, iters: int = 4) -> Run:
    """A new run of these settings after `iters` steps: the same bits each time it is made."""
    config, resolved = load_settings(settings)
    tensor_parallel.model_parallel_cuda_manual_seed(config.seed)
    run = build(config, TrainingData(config), Recorder(config, resolved, parallel), parallel)
    if iters:
        train_interval(run, until=iters)
    return run


def rollouts_of(run: Run) -> Rollouts:
    """Rollouts as a run would be given them."""
    config, parallel = run.config, run.parallel
    share = {"micro_batch_size": config.train.micro_batch_size}

    def open_stream(domain: int, seed: int) -> DomainStream:
        data = TrainingData(config)
        return data.stream(data.names[domain], seed, config.data.sequence_length)

    def deciding_items(task: int) -> list[dict[str, torch.Tensor]]:
        stream = run.tasks[task].decide
        return micro_batches(
            stream,
            range(min(config.probe.task_samples, stream.samples_per_epoch)),
            rank=parallel.data_parallel_rank,
            size=parallel.data_parallel_size,
            multiple=run.forward_backward.microbatch_multiple,
            **share,
        )

    data = RolloutData(
        open_stream,
        run.domains,
        [task.name for task in run.tasks],
        deciding_items,
        global_batch_size=config.train.global_batch_size,
        data_parallel_rank=parallel.data_parallel_rank,
        data_parallel_size=parallel.data_parallel_size,
        **share,
    )
    return Rollouts(run.forward_backward, run.optimizer, run.scheduler, data)


def candidates(domains: list[str], *rows: tuple[float, ...]) -> np.ndarray:
    """Integer weights, int64 (N, D)."""
    mixtures = [Mixture(dict(zip(domains, row, strict=True))) for row in rows]
    return np.array([[m.integer_weights()[name] for name in domains] for m in mixtures])


THREE = ((1, 1, 1), (8, 1, 1), (1, 8, 1))


def state_digests(run: Run) -> dict[str, str]:
    """What training goes on from, a digest for each kind, read from megatron-core's objects."""
    chunks = run.forward_backward.model
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    kinds: dict[str, list[Any]] = {
        "parameters": [p.data for chunk in chunks for p in chunk.parameters()],
        "gradient buffers": [p.main_grad for chunk in chunks for p in chunk.parameters()],
        "modes": [part.training for chunk in chunks for part in chunk.modules()],
        "scheduler": [sorted(run.scheduler.state_dict().items())],
        "default generators": [torch.get_rng_state(), *on_gpu],
        "tracked generators": list(tensor_parallel.get_cuda_rng_tracker().get_states().values()),
        "main parameters": [],
        "optimizer state": [],
        "parameter groups": [],
        "gradients": [],
    }
    for part in distributed_optimizers(run.optimizer):
        for group in part.optimizer.param_groups:
            kinds["parameter groups"].append(
                sorted((key, value) for key, value in group.items() if key != "params")
            )
            for main in group["params"]:
                kinds["main parameters"].append(main.data)
                kinds["gradients"].append(main.grad)
                state = part.optimizer.state.get(main, {})
                kinds["optimizer state"] += [x for key in sorted(state) for x in (key, state[key])]
    return {kind: _digest(values) for kind, values in kinds.items()}


def settled(run: Run) -> dict[str, str]:
    """The digests after a step, as rollouts leave things: gradient buffers empty, and parameters
    gathered where that is otherwise left to the next forward pass."""
    for chunk in run.forward_backward.model:
        chunk.start_param_sync(force_sync=True)
    zero_gradients(run.forward_backward.model, run.optimizer)
    return state_digests(run)


def _digest(values: list[Any]) -> str:
    digest = hashlib.sha256(str(len(values)).encode())
    for value in values:
        if isinstance(value, torch.Tensor):
            digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def bytes_alive() -> int:
    """Bytes of all tensors' storages that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def losses_of_steps(run: Run, steps: int) -> list[float | None]:
    """Training goes on for a few steps: the loss sum on this rank and the gradient norm of each."""
    config = run.config.train
    batches = run.loader.interval(run.state.consumed_samples, steps * config.global_batch_size)
    per_pass = config.micro_batch_size * run.parallel.data_parallel_size
    figures: list[float | None] = []
    for _ in range(steps):
        result = train_step(
            run.forward_backward,
            batches,
            config.global_batch_size // per_pass,
            run.optimizer,
            run.scheduler,
            config.global_batch_size,
        )
        run.state.advance(config.global_batch_size, skipped=result.skipped)
        figures += [float(sum(rows["loss"].sum() for rows in result.loss_sums)), result.grad_norm]
    return figures


def failing(run: Run, calls: int, error: Exception) -> None:
    """Have the run's `forward_step_func` raise at call number `calls` from now on."""
    real = run.forward_backward.forward_step_func
    count = iter(range(10**9))

    def forward_step(*arguments: Any, **options: Any) -> Any:
        if next(count) == calls:
            raise error
        return real(*arguments, **options)

    run.forward_backward.forward_step_func = forward_step
    vars(run.forward_backward)["mended"] = partial(
        setattr, run.forward_backward, "forward_step_func", real
    )
