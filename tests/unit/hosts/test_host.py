"""A Host in a loop of a few lines: what it decides, what it saves, and going on from that."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_tikmix.config import HostedConfig
from megatron_tikmix.config.command_line import load_hosted_config
from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.errors import InputError
from megatron_tikmix.hosts.host import Host
from megatron_tikmix.megatron.step import forward_step, train_step
from megatron_tikmix.training.loop import Run, train
from tests.one_rank import one_rank

BATCH, MICRO = 8, 2


@pytest.fixture
def run(settings: dict[str, Any], tmp_path: Path) -> Iterator[Run]:
    with one_rank(settings, tmp_path) as run:
        yield run


def config_of(run: Run, name: str, **sections: Any) -> HostedConfig:
    ours = run.config
    config = HostedConfig(
        data=ours.data,
        tasks=ours.tasks,
        train=ours.train,
        remix=ours.remix,
        probe=ours.probe,
        run_dir=f"{ours.run_dir}-{name}",
        seed=ours.seed,
    )
    return replace(config, **sections)


def trained(run: Run, host: Host, begin: int, end: int) -> list[torch.Tensor]:
    """Iterations `begin` to `end` with what the host gives; the tokens that were read."""
    host.prepare()
    host.connect(run.forward_backward.model, run.optimizer, run.scheduler, forward_step)
    batches, read = host.micro_batches(), []
    for iteration in range(begin + 1, end + 1):
        micro_batches = [next(batches) for _ in range(BATCH // MICRO)]
        read += [batch["tokens"] for batch in micro_batches]
        train_step(
            run.forward_backward,
            iter(micro_batches),
            len(micro_batches),
            run.optimizer,
            run.scheduler,
            BATCH,
        )
        if host.due(iteration):
            host.decide(iteration)
    return read


def test_our_own_loop_and_a_hosted_one_have_the_same_ledger(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with one_rank(settings, tmp_path) as run:
        run.recorder.open_folder()
        run.recorder.begin("", run.state)
        train(run)
        ours = Ledger.read(run.config.run_dir)
    with one_rank(settings | {"run_dir": settings["run_dir"] + "2"}, tmp_path) as run:
        host = Host(config_of(run, "hosted"), run.parallel)
        trained(run, host, 0, 12)
        hosted = Ledger.read(host.config.run_dir)
    assert len(ours) == len(hosted) == 3
    for own, other in zip(ours, hosted, strict=True):
        assert own.weights == other.weights
        assert own.start_sample == other.start_sample
    assert (ours[2].influence.values_VD == hosted[2].influence.values_VD).all()


def test_it_goes_on_from_its_state(run: Run) -> None:
    whole = trained(run, Host(config_of(run, "whole"), run.parallel), 0, 12)
    first = Host(config_of(run, "parts"), run.parallel)
    read = trained(run, first, 0, 6)
    state = first.state()
    second = Host(
        config_of(run, "parts"),
        run.parallel,
        state=state,
        iteration=6,
        consumed_samples=6 * BATCH,
    )
    assert second.state() == state
    assert second.due(4) is False
    # Its newest stage is that of the checkpoint; what is read after it goes on where it stopped.
    host_batches = second.micro_batches()
    after = [next(host_batches)["tokens"] for _ in range(2 * BATCH // MICRO)]
    again = first.micro_batches()
    skipped = 2 * BATCH // MICRO  # of its interval, which began at iteration 4
    for _ in range(skipped):
        next(again)
    assert all(map(torch.equal, after, [next(again)["tokens"] for _ in after]))
    assert len(whole) == 12 * BATCH // MICRO
    assert len(read) == 6 * BATCH // MICRO


def test_refusals(run: Run) -> None:
    config = config_of(run, "refused")
    with pytest.raises(InputError, match="was saved without TiKMiX"):
        Host(config, run.parallel, iteration=3, consumed_samples=24)
    state = Host(config, run.parallel).state()
    with pytest.raises(InputError, match="seed is 5, and the checkpoint was trained with 1234"):
        Host(replace(config, seed=5), run.parallel, state=state, consumed_samples=0)
    with pytest.raises(InputError, match="has schema 7, and this version reads 1"):
        Host(config, run.parallel, state=state.replace('"schema": 1', '"schema": 7', 1))


def test_a_file_and_what_the_loop_gives_make_a_configuration(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "tikmix.yaml"
    ours = {
        "data": {"manifest": settings["data"]["manifest"], "initial_mixture": "uniform"},
        "tasks": settings["tasks"],
        "remix": {"interval_samples": 32},
    }
    path.write_text(yaml.safe_dump(ours))
    given: dict[str, Any] = {
        "data": {"sequence_length": 64},
        "train": {"train_iters": 12, "global_batch_size": 8},
        "seed": 7,
        "run_dir": "runs/x",
    }
    config = load_hosted_config(str(path), given)
    assert (config.data.sequence_length, config.seed, config.run_dir) == (64, 7, "runs/x")
    assert config.boundaries == [4, 8]
    for changed, words in (
        (ours | {"seed": 3}, "seed follows from the loop's arguments; leave it out"),
        (ours | {"train": {"train_iters": 3}}, "train.train_iters follows from the loop's"),
        (ours | {"remix": {"interval_sample": 3}}, "interval_sample"),
        (ours | {"model": {}}, "model"),
        ({"tasks": 3} | {"data": 4}, "data must be a section"),
        ("words", "must hold sections"),
    ):
        path.write_text(yaml.safe_dump(changed))
        with pytest.raises(InputError, match=words) as caught:
            load_hosted_config(str(path), given)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        load_hosted_config(str(tmp_path / "none.yaml"), given)
