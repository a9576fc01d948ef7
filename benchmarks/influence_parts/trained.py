"""The trained model that every figure starts from, and the probes and rollouts on it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from rich.console import Console

from megatron_tikmix.config import ProbeConfig, RunConfig, load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.measure.probe import InfluenceProbe, ProbeData
from megatron_tikmix.measure.rollouts import RolloutData, Rollouts
from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.build import build
from megatron_tikmix.training.loop import Run
from megatron_tikmix.training.record import Recorder

CONFIG = Path(__file__).resolve().parents[1] / "influence.yaml"

Figures = dict[str, Any]
"""What a part measured, as it is written with --json."""


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        data: folder that benchmarks/corpus.py wrote.
        work: folder for the checkpoint, banks and finished figures.
    """

    data: Path
    work: Path

    def say(self, text: str) -> None:
        """Progress, apart from the tables."""
        Console(stderr=True).print(text, style="dim", markup=False, highlight=False)

    @property
    def arguments(self) -> list[str]:
        """The configuration, and what the folders override in it."""
        folders = ["--data.manifest", str(self.manifest), "--run_dir", str(self.work / "model")]
        return [str(CONFIG), *folders]

    @property
    def manifest(self) -> Path:
        return self.data / "tokens" / "domains.yaml"


def train(settings: Settings) -> None:
    """Fetch the text and train the model as any run is; what is there already is left as it is."""
    if not settings.manifest.is_file():
        command = [sys.executable, str(CONFIG.with_name("corpus.py")), "--output"]
        if subprocess.run([*command, str(settings.data)]).returncode:
            raise InputError("there is no text to train on; the reason is above")
    config, _ = load_config(settings.arguments)
    latest = Path(config.run_dir) / "checkpoints" / "latest_checkpointed_iteration.txt"
    if latest.is_file() and int(latest.read_text()) == config.train.train_iters:
        return
    command = [sys.executable, "-m", "megatron_tikmix", *settings.arguments]
    if subprocess.run(command).returncode:
        raise InputError("the model could not be trained; the reason is above")


@dataclass(frozen=True)
class Trained:
    """The run, brought back to the end of its training."""

    run: Run
    data: TrainingData

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def model(self) -> torch.nn.Module:
        """GPTModel out of its wrappers."""
        return unwrap_model(self.run.forward_backward.model[0])

    def stream(self, domain: int, *seed: object) -> DomainStream:
        """A stream of the domain's train split, with a seed of its own."""
        name = self.data.names[domain]
        length = self.config.data.sequence_length
        return self.data.stream(name, derived_seed(*seed, name), length)

    def probe_data(self, config: ProbeConfig, *, seed: int) -> ProbeData:
        parallel = self.run.parallel
        return ProbeData(
            lambda domain, stage: self.stream(domain, seed, stage),
            self.data.names,
            self.data.tasks,
            sub_batch_samples=config.sub_batch_samples,
            task_samples=config.task_samples,
            micro_batch_size=self.config.train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
            microbatch_multiple=self.run.forward_backward.microbatch_multiple,
        )

    def probe(
        self,
        *,
        seed: int = 0,
        parameters: Sequence[str] = ("*",),
        data: ProbeData | None = None,
        **changes: Any,
    ) -> InfluenceProbe:
        """A probe on parameters of these names, with `changes` to the configuration's.

        It reads streams made of `seed`, or `data` if that is given.
        """
        config, run = replace(self.config.probe, **changes), self.run
        shards = OptimizerShards(
            run.forward_backward.model,
            run.optimizer,
            run.parallel.groups,
            self.data.manifest.vocab_size,
            lambda name: any(fnmatchcase(name, pattern) for pattern in parameters),
        )
        data = data or self.probe_data(config, seed=seed)
        return InfluenceProbe(run.forward_backward, run.optimizer, shards, data, config)

    def rollouts(self, on_progress: Callable[[int, int], None]) -> Rollouts:
        run, parallel, train = self.run, self.run.parallel, self.config.train
        items = self.probe_data(self.config.probe, seed=0)
        data = RolloutData(
            lambda domain, seed: self.stream(domain, seed),
            self.data.names,
            [task.name for task in self.data.tasks],
            items.of_task,
            global_batch_size=train.global_batch_size,
            micro_batch_size=train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
        )
        return Rollouts(
            run.forward_backward, run.optimizer, run.scheduler, data, on_progress=on_progress
        )


@contextmanager
def trained(settings: Settings) -> Iterator[Trained]:
    """The trained run, built on the ranks that were launched."""
    config, resolved = load_config(settings.arguments)
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        data = TrainingData(config)
        run = build(config, data, Recorder(config, resolved, parallel), parallel)
        if not run.state.done:
            raise InputError("the model is not trained; run the part `train` first")
        yield Trained(run, data)
    finally:
        shut_down()


# Large banks, kept on disk ---------------------------------------------------------------


def large_bank(
    settings: Settings,
    found: Trained,
    *,
    sub_batches: int,
    sub_batch_samples: int,
    helpings: int = 1,
    seed: int = 1,
    **changes: Any,
) -> SubBatchBank:
    """So many sub-batches of every domain, measured in `helpings`, each kept once it is there.

    A helping reads a stream of its own, so what is in two of them is independent.
    """
    what = {"sub_batch_samples": sub_batch_samples, "seed": seed, **changes}
    label = "-".join(str(value) for value in what.values())
    per_helping = sub_batches // helpings
    bank: SubBatchBank | None = None
    for helping in range(helpings):
        path = settings.work / "banks" / f"{label}-{per_helping}-{helping}.json"
        if not path.is_file():
            settings.say(f"bank {label}, helping {helping + 1} of {helpings} …")
            probe = found.probe(seed=seed, sub_batch_samples=sub_batch_samples, **changes)
            with probe.open(helping):
                part = probe.add(np.full(len(probe.domains), per_helping))
                seconds, tokens = probe.seconds, probe.tokens
            settings.say(f"  {tokens:,} tokens in {seconds:.0f} s")
            write_json(path, part.to_json())
        part = SubBatchBank.from_json(json.loads(path.read_text(encoding="utf-8")))
        bank = part if bank is None else bank.extended(part)
    assert bank is not None
    return bank


def chosen(bank: SubBatchBank, picks_DB: np.ndarray) -> SubBatchBank:
    """The bank of these sub-batches of each domain: int (D, B); −1 for none."""
    rows_D1 = np.arange(len(bank.domains))[:, None]
    return SubBatchBank(
        bank.sums_DBV[rows_D1, picks_DB] * (picks_DB >= 0)[:, :, None],
        bank.tokens_DB[rows_D1, picks_DB] * (picks_DB >= 0),
        bank.domains,
        bank.tasks,
    )


def write_json(path: Path, content: Any) -> None:
    """Write the file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
