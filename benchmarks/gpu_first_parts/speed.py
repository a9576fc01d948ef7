"""A GPT in bf16: speed beside a plain loop, memory beside the plan, and what a probe takes."""

import dataclasses
import resource
import shutil
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from gpu_first_parts import runs, versions
from gpu_first_parts.notes import Figures, Notes, Skipped

# isort: split
import numpy as np
import torch
from throughput_parts.plain import PlainLoop, Tokenizer, blended

from megatron_tikmix.config import GPTConfig, load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.measure.flops import flops_per_token
from megatron_tikmix.megatron.model import kernels_in_use, layer_spec, padded_vocab_size
from megatron_tikmix.training.loop import Run, train_interval
from megatron_tikmix.training.plan import plan_memory

WARM_UP, TURNS, STEPS = 4, 4, 5
ASKED = 0.99
"""Of a plain loop's speed, on a GPU."""

RECOMPUTE: dict[str, Figures] = {
    "none": {},
    "selective": {"model.recompute_granularity": "selective"},
    "full": {
        "model.recompute_granularity": "full",
        "model.recompute_method": "uniform",
        "model.recompute_num_layers": 1,
    },
}
_GIB = 2**30


def measure(
    notes: Notes,
    device: str,
    work: Path,
    model: str,
    attention: str = "local",
    recompute: str = "none",
) -> None:
    versions.note_machine(notes, device)
    sdpa = hasattr(GPTConfig, "uses_torch_attention")
    if attention == "sdpa" and not sdpa:
        raise Skipped("the configuration has no attention by torch's scaled_dot_product_attention")
    if model == "1b":  # scores of 4,096 tokens are too large to be kept
        attention, recompute = ("sdpa", "none") if sdpa else ("local", "full")
    name = f"{model}-{attention}-{recompute}"
    fields = RECOMPUTE[recompute] | (
        {"model.attention_backend": "flash"} if attention == "sdpa" else {}
    )
    fields["run_dir"] = str(work / "runs" / name)
    settings = runs.gpt(model, device, work, fields)
    shutil.rmtree(settings["run_dir"], ignore_errors=True)
    with runs.built(settings) as (run, data):
        figures = _Measured(notes, run, data)
        problems: list[Exception] = []
        parts: dict[str, Callable[[], None]] = {
            "plan": figures.plan,
            "training step": figures.step,
            "probe": figures.probe,
            "steps after the probe": figures.after,
            "checkpoint": figures.checkpoint,
            "plain loop": lambda: figures.beside_a_plain_loop(str(runs.written(settings))),
        }
        for part, take in parts.items():
            try:
                take()
            except Exception as error:  # the others are worth having all the same
                traceback.print_exc()
                problems.append(error)
                if isinstance(error, torch.OutOfMemoryError):
                    notes.add(f"out of memory: {part}", {"said": str(error)[:200]})
                    traceback.clear_frames(error.__traceback__)  # which hold on to tensors
                    torch.cuda.empty_cache()
        if problems:
            raise problems[0]


class _Measured:
    """The figures of one run, each by a method; they are called in this order."""

    def __init__(self, notes: Notes, run: Run, data: TrainingData) -> None:
        self._notes = notes
        self._run = run
        self._data = data
        config = run.config
        self._tokens = config.train.global_batch_size * config.data.sequence_length
        self._seconds = float("nan")
        assert run.probe_plan is not None
        self._planned = plan_memory(
            config, 1, data.manifest.vocab_size, run.probe_plan.gradient_bytes
        )

    def plan(self) -> None:
        sizes = dataclasses.asdict(self._planned)
        counts = {name: sizes.pop(name) for name in ("parameters", "rank_parameters")}
        figures = counts | {f"{name}, GiB": size / _GIB for name, size in sizes.items()}
        run = self._run
        kernels = kernels_in_use(run.forward_backward.model, run.optimizer)
        self._notes.add("plan", figures | {"kernels": kernels})

    def step(self) -> None:
        run = self._run
        train_interval(run, until=WARM_UP)
        _peak()
        self._seconds = self._timed_steps(2 * STEPS)
        config, vocabulary = run.config, self._data.manifest.vocab_size
        operations = flops_per_token(config.model, vocabulary, config.data.sequence_length)
        planned = self._planned.total - self._planned.kept_gradients
        self._notes.add(
            "training step",
            {
                "tokens/s": self._tokens / self._seconds,
                "TFLOP/s": operations * self._tokens / self._seconds / 1e12,
                "planned, GiB": planned / _GIB,
                **_peak(planned),
            },
        )

    def probe(self) -> None:
        run = self._run
        assert run.remixer is not None
        probe = run.remixer.probe
        _peak()
        started = time.perf_counter()
        with probe.open(1) as opened:
            _wait()
            open_seconds = time.perf_counter() - started
            bank = opened.add(np.full(len(probe.domains), 8))
            _wait()
            seconds = time.perf_counter() - started
            tokens = opened.tokens
        speed = tokens / seconds
        self._notes.add(
            "probe",
            {
                "tokens": tokens,
                "seconds": seconds,
                "of them until it is open": open_seconds,
                "tokens/s": speed,
                "of training's speed": speed * self._seconds / self._tokens,
                "planned, GiB": self._planned.total / _GIB,
                **_peak(self._planned.total),
            },
        )
        finite = bool(np.isfinite(bank.sums_DBV).all() and not bank.bad_tasks)
        self._notes.add("influence", {"finite": finite}, kept=finite)

    def after(self) -> None:
        """Steps after the probe: whether it leaves the allocator in pieces."""
        seconds = self._timed_steps(STEPS)
        retries = torch.cuda.memory_stats().get("num_alloc_retries") if _on_gpu() else None
        self._notes.add(
            "steps after the probe",
            {"of the seconds before": seconds / self._seconds, "allocator retries": retries},
        )

    def checkpoint(self) -> None:
        run = self._run
        started = time.perf_counter()
        saved = run.checkpointer.save(run.state, wait=True)
        save_seconds = time.perf_counter() - started
        folder = Path(run.config.run_dir) / "checkpoints"
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        started = time.perf_counter()
        run.checkpointer.load_latest(run.state)
        self._notes.add(
            "checkpoint",
            {
                "size, GiB": size / _GIB,
                "save, s": save_seconds,
                "load, s": time.perf_counter() - started,
                "host's peak, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            },
            kept=saved,
        )
        shutil.rmtree(folder)

    def beside_a_plain_loop(self, path: str) -> None:
        """Turns of both loops: seconds of the plain one by ours, more than 1 is faster."""
        run = self._run
        config, _ = load_config([path])  # of its own: megatron-core hangs hooks into it
        manifest = self._data.manifest
        dataset = blended(
            {name: manifest.split(name, "train").prefix for name in self._data.names},
            Tokenizer(manifest.vocab_size, manifest.eod),
            config.data.sequence_length,
            (TURNS + 1) * 2 * STEPS * config.train.global_batch_size,
            config.seed,
        )
        vocabulary = padded_vocab_size(manifest.vocab_size, config.model)
        spec = layer_spec(config.model)  # the same kernels
        plain = PlainLoop(config, dataset, run.parallel.groups, vocabulary, spec)
        plain.train(STEPS)
        ratios, seconds = [], []
        for turn in range(TURNS):
            both: dict[bool, float] = {}
            for ours in (True, False) if turn % 2 else (False, True):
                both[ours] = self._timed_steps(STEPS) if ours else _timed(plain.train) / STEPS
            ratios.append(both[False] / both[True])
            seconds.append(both[False])
        ratio = statistics.median(ratios)
        self._notes.add(
            "beside a plain loop of megatron-core",
            {
                "ratio, median": ratio,
                "ratios": sorted(ratios),
                "asked": ASKED,
                "plain, tokens/s": self._tokens / statistics.median(seconds),
            },
            kept=ratio >= ASKED if _on_gpu() else None,
        )

    def _timed_steps(self, steps: int) -> float:
        """Seconds of one of our steps."""
        run = self._run
        return _timed(lambda _: train_interval(run, until=run.state.iteration + steps)) / steps


def _timed(work: Callable[[int], object]) -> float:
    _wait()
    started = time.perf_counter()
    work(STEPS)
    _wait()
    return time.perf_counter() - started


def _on_gpu() -> bool:
    return bool(torch.cuda.is_available())


def _wait() -> None:
    if _on_gpu():
        torch.cuda.synchronize()


def _peak(planned: int = 0) -> Figures:
    """The most memory since the last call, beside what was planned; nothing without a GPU."""
    if not _on_gpu():
        return {}
    allocated = torch.cuda.max_memory_allocated()
    reserved = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return {
        "allocated, GiB": allocated / _GIB,
        "reserved, GiB": reserved / _GIB,
        "planned by allocated": planned / allocated,
    }
