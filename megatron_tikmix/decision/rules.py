"""Rules: all that a boundary decides by, besides what was measured there."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.constraints import DomainGroup, MixtureConstraints
from megatron_tikmix.solve.objective import Goal


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The goal and constraints of a boundary's decision, and when it is followed; for the ledger.

    Nothing in it depends on a configuration any more: the reference mixture, the caps of
    `max_epochs` and the weights of fixed domains are those of the boundary.
    """

    policy: Literal["tikmix_d", "tikmix_m"]

    goal: Goal
    """The goal. `task_weights` names the deciding tasks, unless the gain is a raw sum."""

    constraints: MixtureConstraints

    tasks: tuple[str, ...]
    """The deciding tasks, in their order; of a bank no others are looked at."""

    smoothing: float = 0.0
    """Weight of former boundaries in an exponential average of influence, 0 to below 1."""

    mode: Literal["apply", "advise"] = "apply"
    """`advise`: the mixture in force stays, whatever the answer."""

    candidates: int = 48
    """Number of candidate mixtures that TiKMiX-M measures."""

    require_audit: bool = False
    """True if the mixture in force is kept when the audit refutes the answer."""

    seed: int = 0
    """Seed of bootstrap draws, candidates and the surrogate."""

    def on(self, influence: InfluenceMatrix, prior: Mixture) -> "Rules":
        """Return the rules for an influence matrix that may lack tasks or domains.

        A task that was not measured drops out of the goal; a domain that was not measured keeps
        its weight in `prior`, unless it is fixed to another one.

        Raises:
            InputError: the goal weighs a task that does not decide, or lacks one that was measured.
        """
        weights = self.goal.task_weights
        goal = self.goal
        if weights is not None and set(weights) != set(influence.tasks):
            wrong = sorted((set(weights) - set(self.tasks)) | (set(influence.tasks) - set(weights)))
            if wrong:
                raise InputError(
                    f"task_weights: they must name the deciding tasks, {', '.join(self.tasks)}; "
                    f"different: {', '.join(wrong)}"
                )
            goal = replace(goal, task_weights={name: weights[name] for name in influence.tasks})
        unknown = {name: prior[name] for name in prior if name not in influence.domains}
        constraints = self.constraints
        if unknown:
            fixed = constraints.fixed
            if not isinstance(fixed, Mapping):
                fixed = {name: prior[name] for name in fixed}
            constraints = replace(constraints, fixed={**unknown, **fixed})
        return replace(self, goal=goal, constraints=constraints)

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        plain = asdict(replace(self, goal=Goal(), constraints=MixtureConstraints()))
        return {
            **plain,
            "tasks": list(self.tasks),
            "goal": self.goal.to_json(),
            "constraints": asdict(self.constraints),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Rules":
        """Undo :meth:`to_json`."""
        constraints = dict(data["constraints"])
        constraints["groups"] = {
            name: DomainGroup(**group) for name, group in constraints["groups"].items()
        }
        if not isinstance(constraints["fixed"], Mapping):
            constraints["fixed"] = tuple(constraints["fixed"])
        return cls(
            **{
                **data,
                "tasks": tuple(data["tasks"]),
                "goal": Goal.from_json(data["goal"]),
                "constraints": MixtureConstraints(**constraints),
            }
        )
