"""What a solver returns: the mixture and how it came about."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from megatron_tikmix.mixing.mixture import Mixture


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
    """`solved`: within the constraints, and no worse than the prior. `fallback`: the mixture is
    the prior, for the `reason` given."""

    reason: str
    """Why the prior was kept, in words; empty when solved."""

    objective: float
    uniformity: float
    gain: float
    diversity: float

    effective_domains: float
    """exp(entropy) of the mixture."""

    gain_before: dict[str, float]
    """By task, under the prior."""

    gain_after: dict[str, float]
    """By task, under the mixture."""

    total_variation: float
    """Of the mixture from the prior."""

    active_constraints: list[str]
    """Those met with equality: `lower:<domain>`, `upper:<domain>`, `total_variation`,
    `pareto:<task>`."""

    solver_status: int
    """SLSQP's own: 0 converged, 8 converged as far as rounding lets it, others: not."""

    solver_message: str
    iterations: int
    solve_seconds: float = field(compare=False)

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self) | {"mixture": self.mixture.to_json()}
