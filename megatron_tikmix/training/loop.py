"""The training loop: intervals of one mixture each, and boundaries between them."""

import bisect
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from megatron_tikmix.config import RunConfig
from megatron_tikmix.data.dataset import DataParallelLoader
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.tasks import Task
from megatron_tikmix.decision.decide import Boundary, Decision
from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.errors import TrainingError
from megatron_tikmix.measure.probe_plan import ProbePlan
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.megatron.collectives import (
    check_same_on_all_ranks,
    max_over_ranks,
    sum_over_ranks,
)
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.step import ForwardBackward, LossSums, StepResult, train_step
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.training.checkpoint import Checkpointer
from megatron_tikmix.training.evaluate import evaluate
from megatron_tikmix.training.plan import peak_memory_bytes
from megatron_tikmix.training.record import Recorder
from megatron_tikmix.training.state import TrainState
from megatron_tikmix.training.stopping import Stopping

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """All parts of a run, as :func:`~megatron_tikmix.training.build.build` makes them.

    Attributes:
        boundaries: iterations at which stages begin, without the first and the end of the run.
        planned: the given schedule that is followed; None where the run decides.
        stopping: tells after each step whether the run ends early; None: it never does.
        stop_reason: why the run ended before its last iteration; None if it did not.
        lost_in_a_row: the number of latest iterations in a row whose gradient was not finite.
        place: the current activity, for error messages about ranks that do not respond.
    """

    config: RunConfig
    parallel: Parallel
    state: TrainState
    forward_backward: ForwardBackward
    optimizer: Any
    scheduler: Any
    streams: list[DomainStream]
    loader: DataParallelLoader
    tasks: list[Task]
    remixer: Remixer | None
    probe_plan: ProbePlan | None
    boundaries: list[int]
    planned: MixtureSchedule | None
    initial_mixture: Mixture
    checkpointer: Checkpointer
    recorder: Recorder
    stopping: Stopping | None = None
    stop_reason: str | None = None
    lost_in_a_row: int = 0
    place: str = "the start"

    @property
    def domains(self) -> list[str]:
        return list(self.state.schedule.domains)

    def interval_end(self) -> int:
        """Return the iteration at which the current interval ends."""
        later = bisect.bisect_right(self.boundaries, self.state.iteration)
        return [*self.boundaries, self.config.train.train_iters][later]

    def ends_interval(self) -> bool:
        """Return whether the iteration just completed is the last one of its interval."""
        return self.state.done or self.state.iteration in self.boundaries

    def at_boundary(self) -> bool:
        """Return whether an interval has just ended and the next one has no stage yet."""
        begun = self.state.schedule.stages[-1].start_sample
        return self.state.iteration in self.boundaries and self.state.consumed_samples > begun


def train(run: Run) -> None:
    """Train to the end, resetting the mixture at every boundary. Collective.

    Return early, with a checkpoint and `run.stop_reason` set, when `run.stopping` says so.
    """
    state = run.state
    if not state.ledger:
        open_stage(run, None, measure(run))
    elif state.added_domains and not state.done:
        add_domains(run)
    elif run.at_boundary() and not state.done:
        # The former run ended here without a decision; now this is a boundary.
        reset_mixture(run, measure(run))
    while not state.done:
        row = train_interval(run, until=run.interval_end())
        if run.stop_reason is not None and not run.ends_interval():
            run.recorder.step(row, realised_mixture(run))
            save_to_end(run)
            return
        task_loss = measure(run)
        row |= {
            "task_loss": task_loss,
            "task_bits_per_byte": bits_per_byte(run, task_loss),
            "domain_epochs": epochs(run, row["domain_samples"]),
        }
        run.recorder.step(row, realised_mixture(run))
        # A probe must not delay a run that is to end: it is made when the run is resumed.
        # A signal may also have come after this rank told what it knew in the last step.
        if not state.done and run.stop_reason is None and run.stopping is not None:
            code = int(max_over_ranks(run.stopping.code(), run.parallel))
            run.stop_reason = run.stopping.reason(state.iteration, code)
        if not state.done and run.stop_reason is None:
            if run.probe_plan and len(state.ledger) == 1:
                run.recorder.probe_estimate(run.probe_plan.tokens, row["tokens_per_second"])
            reset_mixture(run, task_loss)
        if run.stop_reason is not None or state.done:
            save_to_end(run)
            return
        run.place = f"the save at iteration {state.iteration}"
        run.checkpointer.save(state)


def save_to_end(run: Run) -> None:
    """Save a checkpoint at the end of the run. Collective.

    Raises:
        TrainingError: saving failed, so the training since the previous checkpoint is lost.
    """
    run.place = f"the save at iteration {run.state.iteration}"
    if not run.checkpointer.save(run.state, wait=True):
        raise TrainingError(
            f"the run ends at iteration {run.state.iteration} without a checkpoint of it, see "
            f"above; make room, and start again to resume from the checkpoint before"
        )


def reset_mixture(run: Run, task_loss: dict[str, float]) -> None:
    """Decide the next interval's mixture, and open its stage. Collective."""
    state = run.state
    run.place = f"the boundary at iteration {state.iteration}"
    at = boundary(run)
    decision: Decision | None
    if run.planned is not None:
        decision = Decision(
            run.planned.mixture(at.stage),
            source="schedule",
            reason=f"stage {at.stage} of {run.config.remix.schedule}",
        )
    else:
        decision = run.remixer.remix(at) if run.remixer else None
    state.schedule.append(state.consumed_samples, decision.mixture if decision else at.prior)
    check_same_on_all_ranks(state.schedule.digest(), "the mixture schedule", run.parallel)
    open_stage(run, decision, task_loss)


def add_domains(run: Run) -> None:
    """Open a stage that gives domains added on resuming their initial weight. Collective."""
    state, initial = run.state, run.initial_mixture
    former = state.ledger[-1].mixture
    rest = 1 - sum(initial[name] for name in state.added_domains)
    mixture = Mixture(
        {
            name: initial[name] if name in state.added_domains else rest * former[name]
            for name in run.domains
        }
    ).rounded()
    reason = f"{', '.join(state.added_domains)} added, with the weight of data.initial_mixture"
    state.schedule.append(state.consumed_samples, mixture)
    check_same_on_all_ranks(state.schedule.digest(), "the mixture schedule", run.parallel)
    state.added_domains = ()
    open_stage(run, Decision(mixture, source="added", reason=reason), measure(run))


def boundary(run: Run) -> Boundary:
    """Return the position of the run, as the decision on the next stage needs it."""
    state, config = run.state, run.config.train
    return Boundary.of(
        state.schedule,
        state.ledger,
        iteration=state.iteration,
        consumed_samples=state.consumed_samples,
        interval_samples=config.consumed_samples(run.interval_end()) - state.consumed_samples,
    )


def train_interval(run: Run, until: int) -> dict[str, Any]:
    """Train up to iteration `until` under one mixture; return the last row of metrics.jsonl.

    Set `run.stop_reason` and return earlier if `run.stopping` says so.
    """
    config, state = run.config.train, run.state
    per_pass = config.micro_batch_size * run.parallel.data_parallel_size
    batches = run.loader.interval(
        state.consumed_samples, config.consumed_samples(until) - state.consumed_samples
    )
    meter = LossMeter(run.domains, run.parallel)
    while True:
        run.place = f"iteration {state.iteration + 1}"
        batch_size = config.batch_sizes.size_at(state.consumed_samples)
        result = train_step(
            run.forward_backward,
            batches,
            batch_size // per_pass,
            run.optimizer,
            run.scheduler,
            batch_size,
            partial(_to_say, run),
        )
        stop_code, writing = result.said
        state.advance(batch_size, skipped=result.skipped)
        if not result.skipped:
            meter.add(result.loss_sums)
        check_finite(run, result)
        run.checkpointer.poll(bool(writing))
        if run.stopping is not None and not state.done:
            run.stop_reason = run.stopping.reason(state.iteration, stop_code)
        if state.iteration == until or run.stop_reason is not None:
            return metrics_row(run, result, meter)
        every = run.config.checkpoint.save_interval
        saving = every is not None and state.iteration % every == 0
        # A save resets the meter, as resuming does, so that a resumed run logs the same rows.
        if saving or state.iteration % config.log_interval == 0:
            run.recorder.step(metrics_row(run, result, meter), realised_mixture(run))
        if saving:
            run.place = f"the save at iteration {state.iteration}"
            run.checkpointer.save(state)


def _to_say(run: Run) -> tuple[int, int]:
    """What this rank tells the others in a step: whether to end, and whether it writes a save."""
    code = 0 if run.stopping is None else run.stopping.code()
    return code, int(run.checkpointer.is_writing())


def check_finite(run: Run, result: StepResult) -> None:
    """Count a skipped update, and stop all ranks when there are too many in a row.

    Raises:
        TrainingError: the gradient was not finite in `train.max_skipped_iterations` iterations in
            a row.
    """
    if math.isfinite(result.grad_norm):
        run.lost_in_a_row = 0
        return
    run.lost_in_a_row += 1
    state, most = run.state, run.config.train.max_skipped_iterations
    if run.parallel.is_main:
        _log.warning(
            "the gradient is not finite at iteration %d: its update is skipped (%d skipped so far)",
            state.iteration,
            state.skipped_iterations,
        )
    if run.lost_in_a_row >= most:
        run.checkpointer.finish()  # a checkpoint being written is the newest to resume from
        before = f" nor at the {most - 1} before," if most > 1 else ""
        raise TrainingError(
            f"the gradient is not finite at iteration {state.iteration},{before} which is "
            f"train.max_skipped_iterations; lower optimizer.lr or look at the data of these "
            f"steps, and start again to resume from the newest checkpoint"
        )


def metrics_row(run: Run, result: StepResult, meter: "LossMeter") -> dict[str, Any]:
    """Return a row of metrics.jsonl; count and log a loss spike. Collective."""
    state = run.state
    lm_loss, domain_loss, domain_tokens, tokens_per_second = meter.collect()
    spike = state.spikes.see(domain_loss, domain_tokens, run.config.train.loss_spike_factor)
    if spike is not None and run.parallel.is_main:
        _log.warning(
            "loss spike: the loss up to iteration %d is %.4g, %.2f times what its domains had of "
            "late (%d spikes so far)",
            state.iteration,
            lm_loss,
            spike,
            state.spikes.count,
        )
    return {
        "iteration": state.iteration,
        "consumed_samples": state.consumed_samples,
        "lm_loss": lm_loss,
        "learning_rate": result.learning_rate,
        "grad_norm": result.grad_norm,
        "tokens_per_second": tokens_per_second,
        "memory_bytes": meter.peak_memory_bytes(),
        "skipped_iterations": state.skipped_iterations,
        "loss_spikes": state.spikes.count,
        "domain_loss": domain_loss,
        "domain_samples": drawn(state),
    }


def measure(run: Run) -> dict[str, float]:
    """Return the validation loss of every task on its reporting items. Collective."""
    run.place = f"the evaluation at iteration {run.state.iteration}"
    task_loss = evaluate(run.forward_backward, run.tasks, run.config.evaluate.task_samples)
    run.recorder.evaluation(run.state.iteration, task_loss)
    return task_loss


def bits_per_byte(run: Run, task_loss: dict[str, float]) -> dict[str, float]:
    """Return the bits per byte of tasks whose bytes are known (prompts with completions)."""
    found = {
        task.name: task.bits_per_byte(task_loss[task.name], run.config.evaluate.task_samples)
        for task in run.tasks
    }
    return {name: value for name, value in found.items() if value is not None}


def drawn(state: TrainState) -> dict[str, int]:
    """Return the samples that training has drawn from each domain so far."""
    counts_D = state.schedule.domain_counts(state.consumed_samples)
    return dict(zip(state.schedule.domains, counts_D.tolist(), strict=True))


def epochs(run: Run, samples: Mapping[str, int]) -> dict[str, float]:
    """Return how many passes over each domain `samples` amount to."""
    return {stream.name: samples[stream.name] / stream.samples_per_epoch for stream in run.streams}


def realised_mixture(run: Run) -> dict[str, float]:
    """Return each domain's share of the samples drawn in the current stage so far."""
    schedule = run.state.schedule
    start = schedule.stages[-1]
    counts_D = schedule.domain_counts(run.state.consumed_samples) - start.start_counts_D
    total = max(int(counts_D.sum()), 1)
    return {name: int(count) / total for name, count in zip(run.domains, counts_D, strict=True)}


def open_stage(run: Run, decision: Decision | None, task_loss: dict[str, float]) -> None:
    """Add the stage that begins here to the ledger, and record it."""
    state = run.state
    stage = state.schedule.stages[-1]
    mixture: Mixture = state.schedule.mixture(-1)
    samples = dict(zip(run.domains, stage.start_counts_D.tolist(), strict=True))
    if decision is None and state.ledger:
        decision = Decision(mixture, source="kept", reason="remix.policy is static")
    elif decision is None:
        decision = Decision(mixture, source="initial", reason=_first_reason(run))
    moved = None
    if state.ledger:
        before = state.ledger[-1].weights
        former = Mixture({name: before.get(name, 0.0) for name in run.domains})
        moved = mixture.total_variation(former)
    state.ledger.append(
        StageRow(
            stage=len(state.ledger),
            start_iteration=state.iteration,
            start_sample=state.consumed_samples,
            weights=mixture.to_json(),
            task_loss=task_loss,
            domain_samples=samples,
            domain_epochs=epochs(run, samples),
            total_variation=moved,
            **decision.fields_of_row(),
        )
    )
    run.recorder.stage(state.ledger)


def _first_reason(run: Run) -> str:
    return f"stage 0 of {run.config.remix.schedule}" if run.planned else "the initial mixture"


class LossMeter:
    """Training loss since the last :meth:`collect`, overall and by domain."""

    def __init__(self, domains: Sequence[str], parallel: Parallel) -> None:
        self._domains = domains
        self._parallel = parallel
        shape = (len(domains), 2)
        self._sums_D2 = torch.zeros(shape, dtype=torch.float64, device=parallel.device)
        self._started = time.perf_counter()

    def add(self, sums: LossSums) -> None:
        """Add a step's micro-batches (see :func:`~megatron_tikmix.megatron.step.loss_sums`)."""
        if not self._parallel.reports_loss:
            return
        for rows in sums:
            values = torch.stack([rows["loss"], rows["tokens"]], dim=1).double()
            # A product, not a scatter, which is not deterministic on a GPU.
            member = torch.nn.functional.one_hot(rows["domain"], len(self._domains)).double()
            self._sums_D2 += member.T @ values

    def peak_memory_bytes(self) -> int:
        """Return the peak memory of the rank that has used most since it started. Collective."""
        used = peak_memory_bytes(self._parallel.device)
        return int(max_over_ranks(used, self._parallel))

    def collect(self) -> tuple[float, dict[str, float], dict[str, float], float]:
        """Return (mean loss, loss by domain, tokens by domain, tokens/s); reset. Collective."""
        loss_D, tokens_D = sum_over_ranks(self._sums_D2, self._parallel).unbind(dim=1)
        seconds = time.perf_counter() - self._started
        self._sums_D2.zero_()
        self._started = time.perf_counter()
        seen = {
            name: (loss, tokens)
            for name, loss, tokens in zip(
                self._domains, loss_D.tolist(), tokens_D.tolist(), strict=True
            )
            if tokens > 0
        }
        domain_loss = {name: loss / tokens for name, (loss, tokens) in seen.items()}
        domain_tokens = {name: tokens for name, (_, tokens) in seen.items()}
        tokens = tokens_D.sum().item()
        mean = loss_D.sum().item() / tokens if tokens else math.nan  # every update was skipped
        return mean, domain_loss, domain_tokens, tokens / seconds
