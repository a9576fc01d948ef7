"""What a solver returns: the mixture and how it came about."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.certificate import Certificate


@dataclass(frozen=True, kw_only=True)
class MixtureSolution:
    """A mixture, and why it was chosen.

    objective = α·uniformity − β·gain − γ·diversity; :class:`Objective` defines the parts.
    Gains per task are in units of normalised rows: the mixture's influence on a task over the
    largest |influence| that any single domain has on it. They lie between −1 and 1, and are 0
    for a task on which no domain has any.
    """

    mixture: Mixture

    status: Literal["solved", "fallback"]
    """`solved`: certified, or found by TiKMiX-M. `fallback`: the nearest mixture to the prior
    within the hard constraints (the prior itself, if it keeps them), for the `reason` given."""

    reason: str
    """The reason for a fallback, and the constraint that had to give way, in words; empty if there
    is none."""

    objective: float
    uniformity: float
    gain: float
    diversity: float

    effective_domains: float
    """exp(entropy) of the mixture."""

    gain_before: dict[str, float]
    """Gain of each task under the prior."""

    gain_after: dict[str, float]
    """Gain of each task under the mixture."""

    total_variation: float
    """Distance of the mixture from the prior."""

    prior_violation: float
    """Largest violation of a hard constraint by the prior; 0 if it keeps all."""

    active_constraints: list[str]
    """Constraints met with equality: `lower:<domain>`, `upper:<domain>`, `fixed:<domain>`,
    `max_epochs:<domain>`, `group_lower:<group>`, `group_upper:<group>`, `total_variation`,
    `pareto:<task>`."""

    certificate: Certificate | None
    """Certificate of the mixture: its feasibility, and a bound on its distance from the optimum;
    None for a fallback, and for TiKMiX-M, whose outcomes are predicted."""

    solver: str
    """`slsqp` or `clarabel`, whichever found the mixture (for a fallback, was tried last);
    `dirichlet` for TiKMiX-M's search."""

    solver_message: str
    iterations: int

    details: dict[str, Any] = field(default_factory=dict)
    """Details that only one method has, as plain values."""

    solve_seconds: float = field(compare=False)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self) | {"mixture": self.mixture.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MixtureSolution":
        """Undo :meth:`to_json`."""
        certificate = data["certificate"]
        return cls(
            **{
                **data,
                "mixture": Mixture.from_json(data["mixture"]),
                "certificate": None if certificate is None else Certificate(**certificate),
            }
        )
