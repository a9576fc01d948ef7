"""Remixer: probe, decide, audit, broadcast. Every line of it is reached by every rank."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from megatron_tikmix.config import MixtureSections
from megatron_tikmix.influence.sub_batch_bank import SubBatchBank
from megatron_tikmix.mixing import Mixture
from megatron_tikmix.parallel.collectives import broadcast_integers
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.audit import audit
from megatron_tikmix.training.decide import Boundary, Decider, Decision, completed
from megatron_tikmix.training.probe import InfluenceProbe
from megatron_tikmix.training.probe_plan import ProbePlan
from megatron_tikmix.training.rollout import RolloutError, Rollouts
from megatron_tikmix.training.rollout_service import RolloutService


class Remixer:
    """Decides the next interval's mixture.

    Args:
        probe: measures influence; see there for what it needs of a Megatron loop.
        decider: the decision itself; used on the main rank only.
        rollouts: where the configuration asks for any, None otherwise.
        plan: how many sub-batches of each domain, and how many tokens a probe may take.
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

    def remix(self, at: Boundary) -> Decision:
        """Decide the mixture of the stage that begins. Collective.

        Call it after an optimizer step and before gradients are accumulated again. It leaves
        gradient buffers empty, and everything else as it found it.

        Args:
            at: `prior` and `iteration` are the same on every rank; the main rank needs the rest.
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
        """The planned sub-batches of each domain, and with `probe.precision` what else it takes."""
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
        """The main rank's decision; None on the others, which take part in its rollouts."""
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
            return decision and replace(decision, rollout=asdict(service.cost))
        return self._decider.decide(bank, at) if self._parallel.is_main else None

    def _agreed(self, decision: Decision | None, at: Boundary) -> Decision:
        """The main rank's decision; on the others its mixture alone.

        Decided once: rounding or a library's version must never make two ranks disagree.
        """
        names = list(at.prior)
        integers = (decision.mixture if decision else at.prior).integer_weights()
        mine = np.array([integers[name] for name in names])
        weights = broadcast_integers(mine, self._parallel)
        if decision is not None:
            return decision
        return Decision(
            Mixture.from_integer_weights(dict(zip(names, weights.tolist(), strict=True)))
        )

    def _audited(self, decision: Decision, at: Boundary) -> Decision:
        """The decision, after an audit where there is one to make."""
        config = self._config.audit
        if not config.enabled or decision.mixture.integer_weights() == at.prior.integer_weights():
            return decision
        assert self._rollouts is not None
        found, objection, failed = None, "", ""
        try:
            found = audit(
                self._rollouts,
                at.prior,
                decision.mixture,
                # What predicts is influence itself, in one unit for all tasks. Of a domain or task
                # that was not measured nothing was predicted.
                None
                if decision.bank is None
                else completed(
                    decision.bank.influence_matrix(),
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
        except RolloutError as error:  # on every rank alike, and training is as it was
            objection = failed = f"there was no audit: {error}"
        if found is not None:
            decision = replace(decision, audit=found.to_json())
            objection = found.reason if found.refutes else ""
        objects = bool(objection) and self._config.remix.require_audit
        keeps = self._agree_to(objects and not decision.forced)
        if keeps:
            reason = f"{decision.reason}; kept all the same: {objection}"
            return replace(decision, mixture=at.prior, source="kept", reason=reason)
        if objects:
            failed = f"followed all the same, as the mixture in force is not allowed: {objection}"
        return replace(decision, reason=f"{decision.reason}; {failed}") if failed else decision

    def _agree_to(self, mine: bool) -> bool:
        """The main rank's answer. Collective."""
        return bool(broadcast_integers(np.array([mine]), self._parallel)[0])
