"""Remixer: probe, decide, audit, broadcast. All ranks take the same path through it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.config import MixtureSections
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.decision.audit import LEAST_REPETITIONS, Audit, judge
from megatron_tikmix.decision.decide import Boundary, Decider, Decision
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import InfluenceMatrix, completed
from megatron_tikmix.measure.probe import InfluenceProbe, ProbeData
from megatron_tikmix.measure.probe_plan import ProbePlan
from megatron_tikmix.measure.rollouts import RolloutData, Rollouts, RolloutService
from megatron_tikmix.measure.shards import OptimizerShards, check_selection
from megatron_tikmix.megatron.collectives import broadcast_integers
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.step import ForwardBackward
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.seeds import derived_seed

Progress = Callable[[int, int], None]
"""A callback for progress, called with (done, total)."""


class Remixer:
    """Decides the next interval's mixture.

    Args:
        probe: measures influence.
        decider: makes the decision; used on the main rank only.
        rollouts: None unless the configuration needs them.
        plan: says how many sub-batches and tokens a probe may take.
    """

    def __init__(
        self,
        probe: InfluenceProbe,
        decider: Decider,
        rollouts: Rollouts | None,
        parallel: Parallel,
        config: MixtureSections,
        plan: ProbePlan,
    ) -> None:
        self.probe = probe
        self._plan = plan
        self._decider = decider
        self._rollouts = rollouts
        self._parallel = parallel
        self._config = config

    @classmethod
    def of(
        cls,
        config: MixtureSections,
        data: TrainingData,
        forward_backward: ForwardBackward,
        optimizer: Any,
        scheduler: Any,
        plan: ProbePlan,
        *,
        on_probe: Progress = lambda done, total: None,
        on_rollout: Progress = lambda done, total: None,
    ) -> "Remixer":
        """Return a Remixer for a model in training and its data, in any loop. Collective.

        Args:
            optimizer: megatron-core's distributed optimizer.
            scheduler: megatron-core's OptimizerParamScheduler; used by rollouts only.
            on_probe, on_rollout: called with (done, total) passes of a probe, and rollouts.

        Raises:
            InputError: `probe.parameters` selects nothing.
        """
        parallel, probe = forward_backward.parallel, config.probe

        length = config.data.sequence_length
        # One sub-batch more, for the curvature of squared gradients.
        probed = (plan.sub_batches + 1) * probe.sub_batch_samples
        if plan.most_tokens is not None:
            probed = max(probed, plan.most_tokens // length)
        rolled_out = max(config.rollout.iters, config.audit.iters) * config.train.global_batch_size

        def probe_stream(domain: int, stage: int) -> DomainStream:
            name = data.names[domain]
            seed = derived_seed(probe.seed, stage, name)
            return data.stream(name, seed, length, first_samples=probed)

        def rollout_stream(domain: int, seed: int) -> DomainStream:
            name = data.names[domain]
            return data.stream(name, derived_seed(seed, name), length, first_samples=rolled_out)

        check_selection(forward_backward.model, probe.parameters, parallel)
        shards = OptimizerShards(
            forward_backward.model,
            optimizer,
            parallel.groups,
            data.manifest.vocab_size,
            probe.parameters.selects,
        )
        probe_data = ProbeData(
            probe_stream,
            data.names,
            data.probed_tasks,
            sub_batch_samples=probe.sub_batch_samples,
            task_samples=probe.task_samples,
            micro_batch_size=config.train.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
            microbatch_multiple=forward_backward.microbatch_multiple,
        )
        rollouts = None
        if config.needs_rollouts:
            rollout_data = RolloutData(
                rollout_stream,
                data.names,
                [task.name for task in data.deciding_tasks],
                probe_data.of_task,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.train.micro_batch_size,
                data_parallel_rank=parallel.data_parallel_rank,
                data_parallel_size=parallel.data_parallel_size,
            )
            rollouts = Rollouts(
                forward_backward, optimizer, scheduler, rollout_data, on_progress=on_rollout
            )
        return cls(
            InfluenceProbe(
                forward_backward, optimizer, shards, probe_data, probe, on_progress=on_probe
            ),
            build_decider(config, data),
            rollouts,
            parallel,
            config,
            plan,
        )

    def remix(self, at: Boundary) -> Decision:
        """Decide the mixture of the stage that begins. Collective.

        Call it after an optimizer step and before gradients are accumulated again. It empties the
        gradient buffers, and leaves everything else unchanged.

        Args:
            at: `prior`, `stage` and `iteration` must be the same on every rank; only the main rank
                needs the rest.
        """
        outside = self._config.outside_phase(at.iteration)
        if outside:
            return Decision(at.prior, source="kept", reason=outside)
        with self.probe.open(at.stage) as probe:
            bank = self._measured(probe, at)
            cost: dict[str, Any] = {
                "probe_tokens": probe.tokens,
                "probe_seconds": probe.seconds,
                "curvature": probe.curvature,
            }
        decision = self._agreed(self._decide(bank, at), at)
        return replace(self._audited(decision, at), **cost)

    def _measured(self, probe: InfluenceProbe, at: Boundary) -> SubBatchBank:
        """Measure the planned sub-batches, and with `probe.precision` more where it needs them."""
        plan, precision, D = self._plan, self._config.probe.precision, len(probe.domains)
        before = probe.tokens
        bank = probe.add(np.full(D, plan.sub_batches))
        if precision is None or plan.most_tokens is None:
            return bank
        cost_of_one = (probe.tokens - before) / (D * plan.sub_batches)
        budget = self._decider.budget(at, precision)
        while True:
            more_D = np.zeros(D, dtype=np.int64)
            if self._parallel.is_main:
                more_D = budget.more(bank, int((plan.most_tokens - probe.tokens) / cost_of_one))
            more_D = broadcast_integers(more_D, self._parallel)
            if not more_D.any():
                return bank
            bank = probe.add(more_D)

    def _decide(self, bank: SubBatchBank, at: Boundary) -> Decision | None:
        """Return the decision on the main rank; None on others, which take part in its rollouts."""
        remix, rollout = self._config.remix, self._config.rollout
        if remix.policy == "tikmix_m" and remix.measure == "rollout":
            assert self._rollouts is not None
            service = RolloutService(
                self._rollouts,
                seed=derived_seed(self._config.probe.seed, "rollout", at.stage),
                iters=rollout.iters,
                repetitions=rollout.repetitions,
            )
            decision = service.run(partial(self._decider.decide, bank, at))
            return decision and replace(decision, rollout=service.cost)
        return self._decider.decide(bank, at) if self._parallel.is_main else None

    def _agreed(self, decision: Decision | None, at: Boundary) -> Decision:
        """Return the main rank's decision; on other ranks, only its mixture.

        Broadcast, since different rounding or library versions could make ranks disagree.
        """
        names = list(at.prior)
        integers = (decision.mixture if decision else at.prior).integer_weights()
        weights_D = np.array([integers[name] for name in names])
        weights = broadcast_integers(weights_D, self._parallel)
        if decision is not None:
            return decision
        return Decision(
            Mixture.from_integer_weights(dict(zip(names, weights.tolist(), strict=True)))
        )

    def _audited(self, decision: Decision, at: Boundary) -> Decision:
        """Audit the decision if the configuration asks for it; return what comes of it."""
        config = self._config.audit
        if not config.enabled or decision.mixture.integer_weights() == at.prior.integer_weights():
            return decision
        assert self._rollouts is not None
        found, failure = None, ""
        measured = decision.measured
        try:
            found = audit(
                self._rollouts,
                at.prior,
                decision.mixture,
                # Predictions use raw influence, whose unit is the same for all tasks. For a domain
                # or task that was not measured there is no prediction.
                None
                if measured is None
                else completed(
                    measured.bank.influence_matrix(),
                    self.probe.domains,
                    list(self._config.deciding_tasks),
                ),
                task_weights={
                    name: task.weight for name, task in self._config.deciding_tasks.items()
                },
                seed=derived_seed(self._config.probe.seed, "audit", at.stage),
                iters=config.iters,
                repetitions=config.repetitions,
                confidence=config.confidence,
            )
        except RolloutError as error:  # on every rank; training's state has been restored
            failure = f"there was no audit: {error}"
        audited = decision.after(found, at.prior, self._config.remix.require_audit, failure)
        # Only the main rank knows what the audit found.
        return self._agreed(audited if self._parallel.is_main else None, at)


def audit(
    rollouts: Rollouts,
    old: Mixture,
    new: Mixture,
    influence: InfluenceMatrix | None,
    *,
    task_weights: Mapping[str, float],
    seed: int,
    iters: int,
    repetitions: int = LEAST_REPETITIONS,
    confidence: float = 0.95,
) -> Audit | None:
    """Compare paired rollouts of two mixtures with what influence predicts for them. Collective.

    The mixtures must be the same on every rank; only rank 0 needs the influence matrix.

    Args:
        seed: must differ from that of rollouts that chose `new`, since a choice looks best on the
            samples it was made on.

    Returns:
        the audit on rank 0, None on the others.

    Raises:
        InputError: fewer than 4 repetitions, or a confidence outside 0 to 1.
        RolloutError: a rollout failed.
    """
    if repetitions < LEAST_REPETITIONS:
        raise InputError(
            f"audit: repetitions is {repetitions}; give at least {LEAST_REPETITIONS}, for "
            f"intervals that mean something"
        )
    if not 0 < confidence < 1:
        raise InputError(f"audit: confidence is {confidence}; it must be between 0 and 1")
    domains = rollouts.data.domains
    pair_ND = np.array([_integers(mixture, domains) for mixture in (old, new)])
    outcomes = rollouts.measure(pair_ND, seed=seed, iters=iters, repetitions=repetitions)
    if not rollouts.parallel.is_main:
        return None
    assert influence is not None, "rank 0 must pass the influence matrix"
    tasks = rollouts.data.tasks
    order = np.ix_(
        [influence.tasks.index(name) for name in tasks],
        [influence.domains.index(name) for name in domains],
    )
    predicted_V = influence.values_VD[order] @ (new.array(domains) - old.array(domains))
    return judge(tasks, task_weights, predicted_V, outcomes, iters=iters, confidence=confidence)


def _integers(mixture: Mixture, domains: Sequence[str]) -> NDArray[np.int64]:
    integers = mixture.integer_weights()
    return np.array([integers[name] for name in domains], dtype=np.int64)


def load_data(config: MixtureSections) -> TrainingData:
    """Open the domains and tasks, and check that the configured decisions are possible on them.

    Raises:
        InputError: the data cannot be trained on, or does not fit the constraints.
    """
    data = TrainingData(config)
    data.check_repetition(config)
    if config.decides and config.remix.interval_samples is not None:
        build_decider(config, data).check(
            data.initial_schedule().mixture(0), config.remix.interval_samples
        )
    return data


def build_decider(config: MixtureSections, data: TrainingData) -> Decider:
    """Return the Decider for a run's boundaries."""
    return Decider(
        config.remix,
        seed=config.probe.seed,
        task_weights={name: task.weight for name, task in config.deciding_tasks.items()},
        samples_per_epoch={stream.name: stream.samples_per_epoch for stream in data.streams},
    )
