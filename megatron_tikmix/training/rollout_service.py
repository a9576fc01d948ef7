"""A solver on rank 0 that asks for rollouts, in which every rank must take part."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.parallel.collectives import broadcast_integers, broadcast_object
from megatron_tikmix.training.rollout import RolloutError, Rollouts, checked_weights

Solution = TypeVar("Solution")
Probe = Callable[[ArrayLike], NDArray[np.float64]]


@dataclass
class RolloutCost:
    """What all rollouts of a service have cost so far; the same on every rank.

    Attributes:
        rollouts: candidates measured, each repetition counted.
        trained_tokens, evaluated_tokens, seconds: as in
            :class:`~megatron_tikmix.training.rollout.RolloutOutcomes`.
    """

    rollouts: int = 0
    trained_tokens: int = 0
    evaluated_tokens: int = 0
    seconds: float = 0.0


class RolloutService:
    """Runs a solver on rank 0, with rollouts for its probe.

    ::

        service = RolloutService(rollouts, seed=..., iters=40)
        solution = service.run(lambda probe: solve_tikmix_m(influence, prior, probe=probe, ...))

    Args:
        seed, iters, repetitions: of :meth:`~megatron_tikmix.training.rollout.Rollouts.measure`.
    """

    def __init__(self, rollouts: Rollouts, *, seed: int, iters: int, repetitions: int = 1) -> None:
        self.cost = RolloutCost()
        self._rollouts = rollouts
        self._parallel = rollouts.parallel
        self._settings = {"seed": seed, "iters": iters, "repetitions": repetitions}
        self._out_of_step = False

    def run(self, solve: Callable[[Probe], Solution]) -> Solution | None:
        """`solve(probe)` on rank 0, the other ranks serving its probes. Collective.

        `probe(weights_ND)` takes candidates as float64 or integer weights, (N, D), and returns
        the drops of the tasks' losses, float64 (N, V), as
        :attr:`~megatron_tikmix.training.rollout.RolloutOutcomes.outcomes_NV`. It raises
        :class:`RolloutError` where rollouts fail; the solver may go on after that.

        Returns:
            the solution on rank 0, None on the others.

        Raises:
            Exception: whatever `solve` raised, on rank 0; on the others an InputError if it was
                one, and a TrainingError otherwise.
        """
        if not self._parallel.is_main:
            self._serve()
            return None
        try:
            solution = solve(self._probe)
        except BaseException as error:
            self._dismiss(error)
            raise
        self._check_in_step()
        self._dismiss(None)
        return solution

    # On rank 0 ---------------------------------------------------------------------------

    def _probe(self, weights_ND: ArrayLike) -> NDArray[np.float64]:
        self._check_in_step()
        # What can be refused is refused before the other ranks hear of it.
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
        """Let the other ranks go, with the reason if it is an error."""
        if self._out_of_step:  # they wait elsewhere; this rank's end will end them
            return
        broadcast_integers(np.array([0]), self._parallel)
        reason = None if error is None else (isinstance(error, InputError), _in_words(error))
        broadcast_object(reason, self._parallel)

    def _check_in_step(self) -> None:
        if self._out_of_step:  # a solver has swallowed the error that came of it
            raise TrainingError("a rollout failed on this rank alone; the job cannot go on")

    # On the others -----------------------------------------------------------------------

    def _serve(self) -> None:
        """Take part in rank 0's rollouts until it needs no more."""
        domains = len(self._rollouts.data.domains)
        while (candidates := int(broadcast_integers(np.array([0]), self._parallel)[0])) > 0:
            asked_ND = np.zeros((candidates, domains), dtype=np.int64)
            try:
                self._measure(broadcast_integers(asked_ND, self._parallel))
            except RolloutError:
                continue  # rank 0 has it too, and its solver says whether that is the end
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


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
