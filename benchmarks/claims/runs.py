"""One training run after another, or several at once, each kept once it is there."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from claims.profile import Profile
from megatron_tikmix.config import ProbeConfig, RemixConfig
from megatron_tikmix.errors import InputError

Result = dict[str, Any]
"""What a run left; see :func:`_result`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run.

    Attributes:
        policy: its name in the tables.
        seed: of parameters, order of data and probes; runs of one seed are pairs.
        settings: what differs from the profile's run, by dotted field.
        online: `odm` or `doremi`, with arguments: the mixture is set by claims.online.
    """

    policy: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    online: tuple[str, Mapping[str, Any]] | None = None


class Runner:
    """Runs experiments, `jobs` at a time, in processes of their own.

    Every process is forked from one that has imported everything, and trains on one thread.
    """

    def __init__(self, profile: Profile, folder: Path, jobs: int) -> None:
        self.profile = profile
        self.folder = folder
        self.jobs = jobs
        self._data = folder.parent / "data" / _digest(profile.corpus)

    @property
    def manifest(self) -> Path:
        return self._data / "tokens" / "domains.yaml"

    def base(self) -> dict[str, Any]:
        """The profile's run, with the paths of its data."""
        run = json.loads(json.dumps(self.profile.run))
        run["data"]["manifest"] = str(self.manifest)
        for task in run["tasks"].values():
            if "prompts" in task:
                task["prompts"] = str(self._data / "benchmarks" / task["prompts"])
        return dict(run)

    def __call__(self, experiments: Sequence[Experiment]) -> list[Result]:
        """The results, in the order of the experiments.

        Raises:
            InputError: a run failed; what others left is kept.
        """
        results: dict[int, Result] = {}
        waiting: dict[Path, list[int]] = {}
        for number, experiment in enumerate(experiments):
            path = self._path(experiment)
            if path.is_file():
                results[number] = json.loads(path.read_text(encoding="utf-8"))
            else:
                waiting.setdefault(path, []).append(number)  # the same run under two names
        with self._pool(len(waiting)) as pool, _progress() as progress:
            bar = progress.add_task("", total=len(waiting), visible=bool(waiting))
            futures: dict[Future[Result], Path] = {}
            for path, numbers in waiting.items():
                futures[pool.submit(_execute, experiments[numbers[0]], self.base(), path)] = path
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    path = futures.pop(future)
                    experiment = experiments[waiting[path][0]]
                    result = _of(future, experiment, path)
                    results |= dict.fromkeys(waiting[path], result)
                    done = f"{experiment.policy}, seed {experiment.seed}"
                    progress.update(bar, advance=1, description=done)
        return [results[number] for number in range(len(experiments))]

    def _path(self, experiment: Experiment) -> Path:
        """Where its result is kept: by all that it depends on, but not by its name."""
        profile = self.profile
        what = [profile.run, profile.corpus, experiment.seed, dict(experiment.settings)]
        what.append(experiment.online)
        if experiment.settings.get("remix.policy", "static") != "static":
            # Other defaults are another experiment.
            what += [asdict(RemixConfig().settled()), asdict(ProbeConfig())]
        return self.folder / "runs" / _digest(what) / "result.json"

    def _pool(self, most: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["megatron_tikmix.training.build", "claims.runs", "claims.online"]
        )
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["PYTHONWARNINGS"] = "ignore"
        return ProcessPoolExecutor(
            max(1, min(self.jobs, most)), mp_context=context, max_tasks_per_child=1
        )


def _digest(what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), transient=True) as progress:
        yield progress


def _of(future: "Future[Result]", experiment: Experiment, path: Path) -> Result:
    try:
        return future.result()
    except Exception as error:
        log = path.with_name("log.txt")
        raise InputError(
            f"the run {experiment.policy}, seed {experiment.seed}, failed ({error}); "
            f"its output is in {log}"
        ) from error


def _execute(experiment: Experiment, base: dict[str, Any], path: Path) -> Result:
    """Train, in a process of its own; leaves `path` and log.txt beside it."""
    folder = path.parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    output = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    (folder / "run.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    result = _train(experiment, folder)
    shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
    unfinished = path.with_name("result.json.tmp")
    unfinished.write_text(json.dumps(result), encoding="utf-8")
    unfinished.replace(path)
    return result


def _train(experiment: Experiment, folder: Path) -> Result:
    import torch

    from claims import online
    from megatron_tikmix.config import load_config
    from megatron_tikmix.measure.flops import flops_per_token
    from megatron_tikmix.training.build import pretrain

    torch.set_num_threads(1)
    arguments = [str(folder / "run.yaml"), "--run_dir", str(folder / "run")]
    seeds = {"seed": experiment.seed, "probe.seed": experiment.seed + 1000}
    for name, value in {**seeds, **experiment.settings}.items():
        text = value if isinstance(value, str) else json.dumps(value)
        arguments += [f"--{name}", text]
    config, resolved = load_config(arguments)
    started = time.perf_counter()
    extra: dict[str, Any] = {}
    if experiment.online is None:
        pretrain(config, resolved)
    else:
        name, options = experiment.online
        extra = online.pretrain(config, resolved, name, **options)
    seconds = time.perf_counter() - started
    per_token = flops_per_token(
        config.model, _vocabulary(config.data.manifest), config.data.sequence_length
    )
    return _result(folder / "run", experiment, per_token, seconds) | extra


def _vocabulary(manifest: str) -> int:
    from megatron_tikmix.data.domains import DomainManifest

    return DomainManifest.load(manifest).vocab_size


def _result(run: Path, experiment: Experiment, per_token: float, seconds: float) -> Result:
    """What is kept of a run.

    Keys: `task_loss` at the end (nats per token, by task), `curve` [[training tokens, task_loss],
    …], `stages` (rows of the ledger without their banks), `tokens` trained on, `decision_tokens`
    (probes and rollouts), `flops`, `decision_flops`, `seconds`, `decision_seconds`.
    """
    rows = _jsonl(run / "metrics.jsonl")
    stages = _jsonl(run / "mixture.jsonl")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    length = config["data"]["sequence_length"]
    curve = [
        [row["consumed_samples"] * length, row["task_loss"]] for row in rows if row.get("task_loss")
    ]
    tokens = rows[-1]["consumed_samples"] * length
    probes = sum(stage["probe_tokens"] or 0 for stage in stages)
    rollouts = [stage["rollout"] for stage in stages if stage.get("rollout")]
    # Forward and backward of a trained token cost three forwards; so an evaluated one a third.
    continued = sum(r["trained_tokens"] + r["evaluated_tokens"] / 3 for r in rollouts)
    return {
        "policy": experiment.policy,
        "seed": experiment.seed,
        "task_loss": curve[-1][1],
        "curve": curve,
        "stages": [{k: v for k, v in stage.items() if k != "bank"} for stage in stages],
        "tokens": tokens,
        "decision_tokens": probes + continued,
        "flops": tokens * per_token,
        "decision_flops": (probes + continued) * per_token,
        "seconds": seconds,
        "decision_seconds": sum(stage["probe_seconds"] or 0 for stage in stages)
        + sum(r["seconds"] for r in rollouts),
    }


def _jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
