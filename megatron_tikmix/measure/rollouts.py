"""Rollouts: short continuations of training under candidate mixtures, undone afterwards.

::

    snapshot ─ losses before ─┬─ restore ─ k steps on candidate 1 ─ losses after
                              ├─ restore ─ k steps on candidate 2 ─ losses after
                              └─ ...                                  restore, release

They read samples blended by a candidate, and the items of tasks that decide (:class:`RolloutData`).
A solver on rank 0 asks for them through a :class:`RolloutService`, in which every rank takes part.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.data.dataset import BlendedDataset, DataParallelLoader
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.decision.audit import RolloutCost, RolloutOutcomes
from megatron_tikmix.errors import InputError, RolloutError, TrainingError
from megatron_tikmix.measure.snapshot import TrainingSnapshot
from megatron_tikmix.megatron.collectives import (
    MeetingPoint,
    broadcast_integers,
    broadcast_object,
    check_same_on_all_ranks,
    first_problem,
    sum_over_ranks,
)
from megatron_tikmix.megatron.samples import Sample
from megatron_tikmix.megatron.step import (
    ForwardBackward,
    StepResult,
    evaluation_mode,
    loss_and_tokens,
    train_step,
)
from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL, Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.seeds import derived_seed


class RolloutData:
    """Micro-batches of one data-parallel rank for short continuations.

    Candidates share their random numbers: for one seed, the k-th sample of a domain is the same
    whatever the weights, and so is the shuffling of the order. Training's cursors are not
    touched.

    Args:
        open_stream: (domain index, seed) to a stream of the domain's train split.
        domains: names, D.
        tasks: names of the validation tasks, V.
        deciding_items: maps a task's index to the micro-batches of its deciding items.
    """

    def __init__(
        self,
        open_stream: Callable[[int, int], DomainStream],
        domains: Sequence[str],
        tasks: Sequence[str],
        deciding_items: Callable[[int], list[Sample]],
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        self._open_stream = open_stream
        self.domains = list(domains)
        self.tasks = list(tasks)
        self._deciding_items = deciding_items
        self.global_batch_size = global_batch_size
        self.num_microbatches = global_batch_size // (micro_batch_size * data_parallel_size)
        self._share = {
            "micro_batch_size": micro_batch_size,
            "data_parallel_rank": data_parallel_rank,
            "data_parallel_size": data_parallel_size,
        }

    def of_tasks(self) -> list[list[Sample]]:
        """Return the micro-batches of each task's deciding items."""
        return [self._deciding_items(task) for task in range(len(self.tasks))]

    def streams(self, seed: int) -> list[DomainStream]:
        """Return a stream of each domain's samples for `seed`, the same for all candidates."""
        return [self._open_stream(domain, seed) for domain in range(len(self.domains))]

    def blended(
        self, streams: Sequence[DomainStream], weights_D: np.ndarray, *, seed: int, iters: int
    ) -> Iterator[Sample]:
        """Return this rank's micro-batches of `iters` global batches, blended as in training.

        Args:
            weights_D: integer weights, int64 (D,), sum 2³⁰.
        """
        schedule = MixtureSchedule(self.domains, self.global_batch_size, seed)
        schedule.append(0, dict(zip(self.domains, weights_D.tolist(), strict=True)))
        loader = DataParallelLoader(BlendedDataset(schedule, streams), num_workers=0, **self._share)
        return loader.interval(0, iters * self.global_batch_size)


Made = TypeVar("Made")

# Seconds that a rank that failed inside a step waits for the others to fail too.
_PATIENCE_SECONDS = 30.0


class Rollouts:
    """Measures candidate mixtures by training on each for a few steps, and undoing them.

    The steps are those of training (:func:`~megatron_tikmix.megatron.step.train_step`), with the
    same global batch size, and continue its learning-rate schedule. Candidates share samples,
    their order and dropout, so that outcomes differ by the effect of the weights alone.
    Making a `Rollouts` is collective.

    Args:
        forward_backward: model chunks, process groups and `forward_step_func`, bound to
            megatron-core's schedule.
        optimizer: megatron-core's distributed optimizer.
        data: samples of rollouts, and the tasks' deciding items.
        on_progress: called with (done, total) rollouts.
    """

    def __init__(
        self,
        forward_backward: ForwardBackward,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        data: RolloutData,
        *,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.parallel = forward_backward.parallel
        self.data = data
        self._forward_backward = forward_backward
        self._model = forward_backward.model
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._on_progress = on_progress
        self._meeting_point = MeetingPoint(_PATIENCE_SECONDS)

    def measure(
        self, weights_ND: ArrayLike, *, seed: int, iters: int, repetitions: int = 1
    ) -> RolloutOutcomes:
        """Measure the drop of each task's loss after `iters` steps on each candidate. Collective.

        Call it between two optimizer steps. Afterwards, also after an error, training's state is
        unchanged, bit for bit, and the gradient buffers are empty.

        Args:
            weights_ND: candidates as integer weights, int64 (N, D), each row summing to 2³⁰; the
                same on every rank.
            seed: of samples, order and dropout. A decision and its audit need different ones.
            repetitions: R, each with fresh samples, the same ones for all candidates.

        Raises:
            InputError: arguments are out of range.
            RolloutError: reading data or a step failed.
        """
        started = time.perf_counter()
        weights_ND = checked_weights(weights_ND, self.data.domains)
        for name, value in (("iters", iters), ("repetitions", repetitions)):
            if value < 1:
                raise InputError(f"rollouts: {name} is {value}; it must be 1 or more")
        what = f"{weights_ND.tolist()} {seed} {iters} {repetitions}"
        check_same_on_all_ranks(what, "what rollouts are asked for", self.parallel)
        plan = _Plan(weights_ND, seed, iters, repetitions)
        snapshot = self._make_on_all_ranks(
            partial(TrainingSnapshot, self._model, self._optimizer, self._scheduler),
            "training's state cannot be copied for rollouts",
        )
        try:
            with _gradient_checks_off(self._model):
                before_V, drops_RNV = self._measure(plan, snapshot)
        except RolloutError:
            snapshot.restore()
            raise
        except Exception as error:
            # Restoring gathers parameters, for which all ranks are needed. If only one failed, the
            # others wait for it in the middle of a step, and the job is lost.
            if not self._meeting_point.all_arrive():
                raise
            snapshot.restore()
            raise RolloutError(f"a rollout failed: {_in_words(error)}") from error
        else:
            snapshot.restore()
        finally:
            snapshot.release()
        return RolloutOutcomes(
            drops_RNV,
            before_V,
            plan.trained_tokens * self.parallel.data_parallel_size,
            plan.evaluated_tokens * self.parallel.data_parallel_size,
            time.perf_counter() - started,
        )

    def _measure(
        self, plan: "_Plan", snapshot: TrainingSnapshot
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the losses before the rollouts, (V,), and their drops, (R, N, V)."""
        N, V = len(plan.weights_ND), len(self.data.tasks)
        items = self._make_on_all_ranks(self.data.of_tasks)
        before_V = self._task_losses(items, plan)
        drops_RNV = np.full((plan.repetitions, N, V), np.nan)
        for r in range(plan.repetitions):
            seed = derived_seed(plan.seed, r)
            streams = self._make_on_all_ranks(partial(self.data.streams, seed))
            for n, weights_D in enumerate(plan.weights_ND):
                snapshot.restore(seed)
                if self._steps(streams, weights_D, seed, plan):
                    drops_V = before_V - self._task_losses(items, plan)
                    if np.isfinite(drops_V[np.isfinite(before_V)]).all():
                        drops_RNV[r, n] = drops_V
                self._on_progress(r * N + n + 1, plan.repetitions * N)
        return before_V, drops_RNV

    def _steps(
        self, streams: Sequence[DomainStream], weights_D: np.ndarray, seed: int, plan: "_Plan"
    ) -> bool:
        """Train on a candidate; return False, on every rank, once a loss or gradient is lost."""
        blended = self._make_on_all_ranks(
            partial(self.data.blended, streams, weights_D, seed=seed, iters=plan.iters)
        )
        for _ in range(plan.iters):
            # Read first: a rank that fails to read must tell the others before they begin the step.
            micro_batches = self._make_on_all_ranks(partial(self._next_batch, blended))
            result = train_step(
                self._forward_backward,
                iter(micro_batches),
                len(micro_batches),
                self._optimizer,
                self._scheduler,
                self.data.global_batch_size,
            )
            plan.trained_tokens += _tokens(micro_batches)
            if sum_over_ranks(torch.tensor([_is_lost(result)]), self.parallel).item() > 0:
                return False
        return True

    def _next_batch(self, blended: Iterator[Sample]) -> list[Sample]:
        return list(itertools.islice(blended, self.data.num_microbatches))

    @torch.no_grad()
    def _task_losses(self, items: list[list[Sample]], plan: "_Plan") -> NDArray[np.float64]:
        """Return each task's mean loss per unmasked token of deciding items, nats, float64 (V,)."""
        totals = []
        with evaluation_mode(self._model):
            for batches in items:
                sums = self._forward_backward(batches, len(batches), forward_only=True)
                totals.append(loss_and_tokens(sums, self.parallel))
                plan.evaluated_tokens += _tokens(batches)
        loss_V, tokens_V = sum_over_ranks(torch.stack(totals), self.parallel).unbind(dim=1)
        return (loss_V / tokens_V).numpy()

    def _make_on_all_ranks(
        self, make: Callable[[], Made], failure: str = "the data of a rollout cannot be read"
    ) -> Made:
        """Return `make()`, which must not communicate; raise on every rank if one rank fails."""
        made: list[Made] = []
        problem = None
        try:
            made.append(make())
        except Exception as error:
            problem = _in_words(error)
        problem = first_problem(problem, self.parallel)
        if problem is not None:
            raise RolloutError(f"{failure}: {problem}")
        return made[0]


@dataclass
class _Plan:
    """The arguments of one call of :meth:`Rollouts.measure`, and its cost so far."""

    weights_ND: NDArray[np.int64]
    seed: int
    iters: int
    repetitions: int
    trained_tokens: int = field(default=0, init=False)
    evaluated_tokens: int = field(default=0, init=False)


def checked_weights(weights_ND: ArrayLike, domains: Sequence[str]) -> NDArray[np.int64]:
    """Return candidates as integer weights, int64 (N, D), each row summing to 2³⁰.

    Integers are kept; weights in floating point are normalised and rounded as
    :meth:`Mixture.integer_weights` does.

    Raises:
        InputError: wrong shape, no candidate, or a row that is not a mixture.
    """
    given = np.asarray(weights_ND)
    if given.ndim != 2 or given.shape[1] != len(domains) or len(given) == 0:
        raise InputError(
            f"rollouts: candidates have shape {given.shape}; give one row of {len(domains)} "
            f"weights for each, and at least one"
        )
    if np.issubdtype(given.dtype, np.floating):
        rows = [dict(zip(domains, row, strict=True)) for row in given.tolist()]
        return np.array([list(Mixture(row).integer_weights().values()) for row in rows])
    if not np.issubdtype(given.dtype, np.integer):
        raise InputError(f"rollouts: candidates are {given.dtype}; give numbers")
    integers = given.astype(np.int64)
    if (integers < 0).any() or (integers.sum(axis=1) != WEIGHT_TOTAL).any():
        raise InputError(
            f"rollouts: integer weights must be zero or more and sum to {WEIGHT_TOTAL}; "
            f"take them from Mixture.integer_weights()"
        )
    return integers


@contextmanager
def _gradient_checks_off(model: list[DistributedDataParallel]) -> Iterator[None]:
    """Turn off megatron-core's checks of gradients: a failing rollout must not end the run.

    They would raise on a single rank, in the middle of a step.
    """
    configs = [chunk.ddp_config for chunk in model]
    kept = [(config.check_for_nan_in_grad, config.check_for_large_grads) for config in configs]
    for config in configs:
        config.check_for_nan_in_grad = config.check_for_large_grads = False
    try:
        yield
    finally:
        for config, checks in zip(configs, kept, strict=True):
            config.check_for_nan_in_grad, config.check_for_large_grads = checks


def _is_lost(result: StepResult) -> bool:
    """Return whether this rank sees a loss or gradient norm that is not finite."""
    if not math.isfinite(result.grad_norm):
        return True
    return any(not torch.isfinite(rows["loss"]).all() for rows in result.loss_sums)


def _tokens(batches: list[Sample]) -> int:
    return sum(batch["tokens"].numel() for batch in batches)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


Solution = TypeVar("Solution")
Measure = Callable[[ArrayLike], NDArray[np.float64]]


class RolloutService:
    """Runs a solver on rank 0, and on all ranks the rollouts that it asks for.

    ::

        service = RolloutService(rollouts, seed=..., iters=40)
        solution = service.run(lambda measure: solve_tikmix_m(influence, prior, measure=measure))

    Args:
        seed, iters, repetitions: of :meth:`~megatron_tikmix.measure.rollouts.Rollouts.measure`.
    """

    def __init__(self, rollouts: Rollouts, *, seed: int, iters: int, repetitions: int = 1) -> None:
        self.cost = RolloutCost()
        self._rollouts = rollouts
        self._parallel = rollouts.parallel
        self._settings = {"seed": seed, "iters": iters, "repetitions": repetitions}
        self._out_of_step = False

    def run(self, solve: Callable[[Measure], Solution]) -> Solution | None:
        """Return `solve(measure)`, run on rank 0 with rollouts on all ranks. Collective.

        `measure(weights_ND)` takes candidates as float64 or integer weights, (N, D), and returns
        the drops of the tasks' losses, float64 (N, V), as
        :attr:`~megatron_tikmix.measure.rollouts.RolloutOutcomes.outcomes_NV`. It raises
        :class:`RolloutError` where rollouts fail; the solver may continue after that.

        Returns:
            the solution on rank 0, None on the others.

        Raises:
            Exception: on rank 0, whatever `solve` raised; on the others, InputError if it was one,
                else TrainingError.
        """
        if not self._parallel.is_main:
            self._serve()
            return None
        try:
            solution = solve(self._request)
        except BaseException as error:
            self._dismiss(error)
            raise
        self._check_in_step()
        self._dismiss(None)
        return solution

    # On rank 0 ---------------------------------------------------------------------------

    def _request(self, weights_ND: ArrayLike) -> NDArray[np.float64]:
        self._check_in_step()
        # Refuse bad candidates before the other ranks are involved.
        integers_ND = checked_weights(weights_ND, self._rollouts.data.domains)
        broadcast_integers(np.array([len(integers_ND)]), self._parallel)
        broadcast_integers(integers_ND, self._parallel)
        try:
            return self._measure(integers_ND)
        except RolloutError:
            raise
        except BaseException:
            self._out_of_step = True
            raise

    def _dismiss(self, error: BaseException | None) -> None:
        """Release the other ranks, and send them the error if there is one."""
        if self._out_of_step:  # they wait in another collective, until this rank's exit ends them
            return
        broadcast_integers(np.array([0]), self._parallel)
        reason = (
            None if error is None else (isinstance(error, InputError), _seconds_in_words(error))
        )
        broadcast_object(reason, self._parallel)

    def _check_in_step(self) -> None:
        if self._out_of_step:  # a solver has swallowed the error
            raise TrainingError("a rollout failed on this rank alone; the job cannot go on")

    # On the others -----------------------------------------------------------------------

    def _serve(self) -> None:
        """Take part in rank 0's rollouts until it needs no more of them."""
        domains = len(self._rollouts.data.domains)
        while (candidates := int(broadcast_integers(np.array([0]), self._parallel)[0])) > 0:
            asked_ND = np.zeros((candidates, domains), dtype=np.int64)
            try:
                self._measure(broadcast_integers(asked_ND, self._parallel))
            except RolloutError:
                continue  # raised on rank 0 too, where the solver decides whether to continue
        reason = broadcast_object(None, self._parallel)
        if reason is not None:
            is_input, words = reason
            raise InputError(words) if is_input else TrainingError(f"rank 0: {words}")

    # On all ------------------------------------------------------------------------------

    def _measure(self, integers_ND: NDArray[np.int64]) -> NDArray[np.float64]:
        outcomes = self._rollouts.measure(integers_ND, **self._settings)
        self.cost.rollouts += len(integers_ND) * self._settings["repetitions"]
        self.cost.trained_tokens += outcomes.trained_tokens
        self.cost.evaluated_tokens += outcomes.evaluated_tokens
        self.cost.seconds += outcomes.seconds
        return outcomes.outcomes_NV


def _seconds_in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
