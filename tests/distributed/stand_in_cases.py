"""Ranks of small layouts, one after another, on the device that stands in for an accelerator.

usage: python -m tests.distributed.stand_in_cases SETTINGS.yaml CASES.yaml [RESULT.json]

A process of its own: the stand-in changes torch and megatron-core for good. For each case it writes
what it saw, rank by rank.
"""

import contextlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_tikmix.rehearsal import stand_in

stand_in.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import yaml  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from megatron_tikmix.config import load_config  # noqa: E402
from megatron_tikmix.measure import probe  # noqa: E402
from megatron_tikmix.measure.remixer import load_data  # noqa: E402
from megatron_tikmix.megatron import step  # noqa: E402
from megatron_tikmix.rehearsal.rehearse import join  # noqa: E402
from megatron_tikmix.training import loop  # noqa: E402
from megatron_tikmix.training.build import build  # noqa: E402
from megatron_tikmix.training.checkpoint import Checkpointer  # noqa: E402
from megatron_tikmix.training.record import Recorder  # noqa: E402
from megatron_tikmix.training.stopping import Stopping  # noqa: E402
from tests.conftest import forget_attention_backend, overridden  # noqa: E402


def run_case(
    settings: dict[str, Any], world_size: int, rank: int, plant: str | None, said: list[Any]
) -> dict:
    """Train, evaluate, probe, remix and save on one rank; what was seen."""
    folder = Path(tempfile.mkdtemp())
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings | {"run_dir": str(folder / "run")}))
    seen: dict[str, Any] = {"errors": []}
    forget_attention_backend()
    try:
        config, resolved = load_config([str(path)])
        config.check(world_size)
        parallel = join(config, world_size, rank)
        watched = stand_in.StandIn(heard=said)

        def part(name: str, do: Any) -> Any:
            try:
                with watched.phase(name):
                    return do()
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:200]
                seen["errors"].append(f"{name}: {type(error).__name__}: {text} at {place}")
                if os.environ.get("VERBOSE"):
                    traceback.print_exc()

        with watched, planted(plant, rank):
            data = load_data(config)
            recorder = Recorder(config, resolved, parallel)
            recorder.open_folder()
            run = part("build", lambda: build(config, data, recorder, parallel))
            loop_of[:] = [run]
            run.stopping = Stopping(config.train)
            recorder.begin("", run.state)
            part("start", lambda: loop.open_stage(run, None, loop.measure(run)))
            part("first steps", lambda: loop.train_interval(run, until=2))
            with mock.patch.object(loop, "train_step", partial(one_step, watched, loop.train_step)):
                part("third step", lambda: loop.train_interval(run, until=3))
            if run.remixer is not None:
                part("boundary", lambda: loop.reset_mixture(run, loop.measure(run)))
                part("steps after", lambda: loop.train_interval(run, until=4))
            seen["misplaced state"] = part("checkpoint", lambda: misplaced_state(run))
            part("resume", lambda: run.checkpointer._sharded_state(is_loading=True))
            recorder.close()
        seen["waits"] = [[phase, place, n] for (phase, place), n in watched.waits.items()]
        seen["misplaced"] = [[phase, at, n] for (phase, at), n in watched.misplaced.items()]
        seen["collectives"] = [
            [c.phase, c.kind, list(c.ranks), c.nbytes, c.on_host] for c in watched.collectives
        ]
        seen["peaks"] = {p: watched.peak(p) for p in ("build", "step", "boundary")}
        if rank == 0:
            said[:] = watched.said
        seen["source"] = run.state.ledger[-1].source if run.state.ledger else None
    finally:
        parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()
    return seen


def misplaced_state(run: loop.Run) -> list[str]:
    """Parameters that a checkpoint would not take from the device.

    megatron-core gathers the optimizer's state on the host of one rank by itself.
    """
    state = run.checkpointer._sharded_state(is_loading=False)
    del state["optimizer"]
    found = []

    def look(value: Any) -> None:
        if isinstance(value, ShardedTensor):
            if value.data is not None and value.data.device != stand_in.DEVICE:
                found.append(value.key)
        elif isinstance(value, dict):
            for each in value.values():
                look(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    look(state)
    return found


def one_step(watched: stand_in.StandIn, train_step: Any, *arguments: Any) -> Any:
    """An optimizer step, and nothing of the loop around it."""
    with watched.phase("step"):
        return train_step(*arguments)


@contextlib.contextmanager
def planted(what: str | None, rank: int) -> Iterator[None]:
    """Break one thing, for the test to find."""
    if what is None:
        yield
        return
    owner, name, broken = {
        "a CPU tensor in the loss": (step, "loss_sums", cpu_tensor_in_the_loss),
        "a CPU tensor in the probe's sums": (probe, "inner_products", cpu_tensor_in_the_sums),
        "a CPU tensor in a checkpoint": (Checkpointer, "_sharded_state", cpu_tensor_in_the_state),
        "a collective that one rank skips": (step, "gradient_is_lost", collective_of_rank_0),
        "a host wait in a step": (step, "gradient_is_lost", host_wait),
    }[what]
    with mock.patch.object(owner, name, partial(broken, getattr(owner, name), rank)):
        yield


def cpu_tensor_in_the_loss(loss_sums: Any, rank: int, mask: Any, *rest: Any) -> Any:
    return loss_sums(torch.ones(mask.shape), *rest)


def cpu_tensor_in_the_sums(inner_products: Any, rank: int, *arguments: Any) -> Any:
    products_V = inner_products(*arguments)
    return products_V + torch.zeros(products_V.shape)


def cpu_tensor_in_the_state(sharded_state: Any, rank: int, **arguments: Any) -> Any:
    run = loop_of[-1]
    state = sharded_state(run.checkpointer, **arguments)
    part = next(key for key in state if key not in ("optimizer", "scheduler", "rng_state"))
    first = next(value for value in state[part].values() if isinstance(value, ShardedTensor))
    first.data = torch.zeros(first.data.shape)
    return state


def collective_of_rank_0(gradient_is_lost: Any, rank: int, model: Any) -> Any:
    if rank == 0:
        dist.all_reduce(torch.zeros(1, device=stand_in.DEVICE))
    return gradient_is_lost(model)


def host_wait(gradient_is_lost: Any, rank: int, model: Any) -> Any:
    return int(bool(not gradient_is_lost(model)))


loop_of: list[loop.Run] = []


def main(settings: str, cases: str, result: str | None = None) -> None:
    warnings.simplefilter("ignore")
    base = yaml.safe_load(Path(settings).read_text())
    found: dict[str, Any] = {}
    for name, case in yaml.safe_load(Path(cases).read_text()).items():
        ranks = case.get("ranks", range(case["world_size"]))
        found[name], said = {}, []
        for rank in ranks:
            try:
                seen = run_case(
                    overridden(base, case.get("settings", {})),
                    case["world_size"],
                    rank,
                    case.get("plant"),
                    said,
                )
            except Exception as error:
                if os.environ.get("VERBOSE"):
                    traceback.print_exc()
                seen = {"errors": [f"{type(error).__name__}: {error}"]}
            found[name][str(rank)] = seen
            print(name, rank, seen["errors"] or "ok", seen.get("source"), flush=True)
            if os.environ.get("VERBOSE"):
                print(Counter({(a, b): n for a, b, n in seen.get("waits", [])}))
                print(seen.get("misplaced"), seen.get("peaks"), seen.get("misplaced state"))
    if result:
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
