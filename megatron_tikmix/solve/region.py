"""The mixtures that the constraints leave, as arrays; and which constraints conflict.

    Σ w = 1                                            a mixture
    lower ≤ w ≤ upper,  groups_MD w ≥ group_least_M    hard
    Σ_j max(w_j − prior_j, 0) ≤ limit                  largest change, in total variation
    r_i·d + slack ≥ ‖e_i ∘ d‖,  d = w − origin         Pareto, for every task i

r_i is task i's row of normalised influence and e_i its standard errors times κ, the quantile at
1 − δ/V (method.md, section 2): the true loss of task i then stays below with probability
1 − δ/V. Without standard errors e_i = 0, and the cone is a half-space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linprog
from scipy.stats import norm
from scipy.stats import t as student_t

from megatron_tikmix.errors import InputError
from megatron_tikmix.solve.constraints import MixtureConstraints

Array = NDArray[np.float64]

FEASIBLE = 1e-8
"""A constraint may be broken by so much, in weight or in normalised influence."""

_SHOWN = 6  # names of a conflict that are listed
_FILTERED = 50  # conflicts of up to so many constraints are made irreducible


class Conflict(NamedTuple):
    """Constraints that cannot hold together."""

    names: list[str]
    amount: float
    """The least sum of their violations, in weight (in normalised influence for Pareto)."""

    def __str__(self) -> str:
        listed = ", ".join(self.names[:_SHOWN])
        more = len(self.names) - _SHOWN
        return (
            f"the constraints {listed}{f' and {more} more' if more > 0 else ''} cannot hold "
            f"together: they miss by {self.amount:.3g}"
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Region:
    """A convex set of mixtures; domains and tasks in the order of all (D,) and (V,) arrays."""

    domains: Sequence[str]
    tasks: Sequence[str]

    lower_D: Array
    upper_D: Array
    lower_names: Sequence[str]
    upper_names: Sequence[str]
    """Which constraint each bound comes from: `lower:<domain>`, `fixed:<domain>`,
    `upper:<domain>`, `max_epochs:<domain>`, `reference:<domain>`."""

    groups_MD: Array
    """0 and 1 where a group's sum must be large, 0 and −1 where it must be small."""
    group_least_M: Array
    group_names: Sequence[str]
    """`group_lower:<group>`, `group_upper:<group>`."""

    prior_D: Array
    limit: float | None
    """Largest total variation from the prior."""

    origin_D: Array
    """What Pareto compares with: the prior, unless that breaks a hard constraint."""
    rows_VD: Array
    """Normalised influence, r_i; no rows without Pareto."""
    slack: float
    errors_VD: Array | None
    """κ times the standard errors of `rows_VD`; None: a half-space a task."""

    def slacks(self, weights_D: Array) -> dict[str, float]:
        """Return the slack of every constraint, by name; negative where it is broken."""
        named = [
            *zip(self.lower_names, weights_D - self.lower_D, strict=True),
            *zip(self.upper_names, self.upper_D - weights_D, strict=True),
            *zip(self.group_names, self.groups_MD @ weights_D - self.group_least_M, strict=True),
        ]
        if self.limit is not None:
            moved = 0.5 * np.abs(weights_D - self.prior_D).sum()
            named.append(("total_variation", self.limit - moved))
        names = [f"pareto:{task}" for task in self.tasks[: len(self.rows_VD)]]
        named += zip(names, self.pareto(weights_D), strict=True)
        slacks: dict[str, float] = {}
        for name, slack in named:  # `fixed` bounds from both sides
            slacks[name] = min(float(slack), slacks.get(name, np.inf))
        return slacks

    def pareto(self, weights_D: Array) -> Array:
        """What is left of Pareto for each task, normalised, (V,)."""
        move_D = weights_D - self.origin_D
        gained_V = self.rows_VD @ move_D + self.slack
        if self.errors_VD is None:
            return gained_V
        left_V: Array = gained_V - np.linalg.norm(self.errors_VD * move_D, axis=1)
        return left_V

    def violation(self, weights_D: Array) -> tuple[float, str]:
        """By how much the worst-kept constraint is broken (0 if none is), and its name."""
        slacks = self.slacks(weights_D)
        worst = min(slacks, key=lambda name: slacks[name])
        return max(0.0, -slacks[worst]), worst

    def hard(self) -> "Region":
        """The same without Pareto and without a limit to the change."""
        return replace(self.without_pareto(), limit=None)

    def without_pareto(self) -> "Region":
        return replace(self, rows_VD=self.rows_VD[:0], errors_VD=None)

    def tidied(self, weights_D: Array) -> Array:
        """The nearest weights, as far as a solver's rounding goes: within the bounds, of sum 1,
        no further from the prior than the limit."""
        weights_D = weights_D.clip(self.lower_D, self.upper_D)
        missing = 1.0 - weights_D.sum()
        room_D = self.upper_D - weights_D if missing > 0 else weights_D - self.lower_D
        if room_D.sum() > 0:
            weights_D = weights_D + missing * room_D / room_D.sum()
        if self.limit is not None:
            move_D = weights_D - self.prior_D
            moved = 0.5 * np.abs(move_D).sum()
            if moved > self.limit and self._holds_hard(self.prior_D):
                weights_D = self.prior_D + move_D * (self.limit / moved)
        return weights_D

    def _holds_hard(self, weights_D: Array) -> bool:
        return self.hard().violation(weights_D)[0] <= FEASIBLE

    # Conflicts --------------------------------------------------------------------------

    def conflict(self) -> Conflict | None:
        """Constraints that cannot hold together, or None if all can; cones taken as half-spaces.

        A linear program lets every constraint give way at the cost of how much it does. Those
        with a multiplier are in the conflict, and of a few it is found which are needed.
        """
        names = [row.name for row in self._elastic_rows()]
        amount, multipliers = self._least_violation(names)
        if amount <= FEASIBLE:
            return None
        conflict = [name for name in names if multipliers[name] > 1e-9]
        if len(conflict) <= _FILTERED:
            for name in list(conflict):
                fewer = [other for other in conflict if other != name]
                if self._least_violation(fewer)[0] > FEASIBLE:
                    conflict = fewer
        return Conflict(conflict, self._least_violation(conflict)[0])

    def _least_violation(self, names: Sequence[str]) -> tuple[float, dict[str, float]]:
        """The least summed violation of the constraints named, the others left out, and their
        multipliers.

        Variables w_D, t_D ≥ max(w − prior, 0) and a violation of each constraint.
        """
        D = len(self.domains)
        rows = [row for row in self._elastic_rows() if row.name in set(names)]
        gained_rows = sparse.hstack([sparse.eye_array(D), -sparse.eye_array(D)])  # w − t ≤ prior
        named_rows = np.array([-row.coefficients for row in rows]).reshape(len(rows), 2 * D)
        inequalities: Any = sparse.vstack(
            [
                sparse.hstack([sparse.csr_array(named_rows), -sparse.eye_array(len(rows))]),
                sparse.hstack([gained_rows, sparse.csr_array((D, len(rows)))]),
            ]
        )
        answer: Any = linprog(
            np.concatenate([np.zeros(2 * D), np.ones(len(rows))]),
            A_ub=inequalities,
            b_ub=np.concatenate([[-row.least for row in rows], self.prior_D]),
            A_eq=np.concatenate([np.ones(D), np.zeros(D + len(rows))])[None],
            b_eq=[1.0],
            bounds=(0, None),
            method="highs",
        )
        if answer.status != 0:
            raise RuntimeError(f"the search for a conflict failed: {answer.message}")
        found = -np.asarray(answer.ineqlin.marginals)[: len(rows)]
        multipliers = dict.fromkeys(names, 0.0)
        for row, multiplier in zip(rows, found, strict=True):
            multipliers[row.name] = max(multipliers[row.name], float(multiplier))
        return float(answer.fun), multipliers

    def _elastic_rows(self) -> Iterator["_Row"]:
        """Every constraint but Σ w = 1 and w ≥ 0, as coefficients·(w, t) ≥ least."""
        D = len(self.domains)
        unit_DD, none_D = np.eye(D), np.zeros(D)
        for d in np.flatnonzero(self.lower_D > 0).tolist():
            row_D = np.concatenate([unit_DD[d], none_D])
            yield _Row(self.lower_names[d], row_D, self.lower_D[d])
        for d in np.flatnonzero(self.upper_D < 1).tolist():
            row_D = np.concatenate([-unit_DD[d], none_D])
            yield _Row(self.upper_names[d], row_D, -self.upper_D[d])
        for name, row_D, least in zip(
            self.group_names, self.groups_MD, self.group_least_M, strict=True
        ):
            yield _Row(name, np.concatenate([row_D, none_D]), least)
        if self.limit is not None:
            yield _Row("total_variation", np.concatenate([none_D, none_D - 1]), -self.limit)
        for task, row_D in zip(self.tasks, self.rows_VD, strict=False):
            least = row_D @ self.origin_D - self.slack
            yield _Row(f"pareto:{task}", np.concatenate([row_D, none_D]), least)


class _Row(NamedTuple):
    name: str
    coefficients: Array
    least: float


def region_of(
    constraints: MixtureConstraints,
    domains: Sequence[str],
    tasks: Sequence[str],
    prior_D: Array,
    rows_VD: Array,
    standard_error_VD: Array | None = None,
    *,
    degrees_of_freedom: float | None = None,
    reference_D: Array | None = None,
) -> Region:
    """The region that `constraints` describe.

    Args:
        rows_VD: normalised influence.
        standard_error_VD: of `rows_VD`; used when `constraints.confidence` is set.
        degrees_of_freedom: of the standard errors, for Student's t; None: the normal quantile.
        reference_D: of the diversity term; a domain of reference weight 0 stays at 0.

    Raises:
        InputError: hard constraints that cannot hold together, named; an unknown domain; a
            confidence without standard errors.
    """
    lower_D, upper_D = constraints.bounds(domains)
    lower_names = [f"lower:{name}" for name in domains]
    upper_names = [f"upper:{name}" for name in domains]
    tighter = [("max_epochs", constraints.caps(domains))]
    if reference_D is not None:
        tighter.append(("reference", np.where(reference_D > 0, 1.0, 0.0)))
    for field, cap_D in tighter:
        for d in np.flatnonzero(cap_D < upper_D).tolist():
            upper_names[d] = f"{field}:{domains[d]}"
        upper_D = np.minimum(upper_D, cap_D)
    fixed_D = constraints.fixed_weights(domains, prior_D)
    for d in np.flatnonzero(np.isfinite(fixed_D)).tolist():
        # A bound that the fixed weight breaks stays, so that the conflict is found.
        if fixed_D[d] >= lower_D[d]:
            lower_D[d], lower_names[d] = fixed_D[d], f"fixed:{domains[d]}"
        if fixed_D[d] <= upper_D[d]:
            upper_D[d], upper_names[d] = fixed_D[d], f"fixed:{domains[d]}"
    groups_MD, group_least_M, group_names = _groups(constraints, domains)
    region = Region(
        domains=domains,
        tasks=tasks,
        lower_D=lower_D,
        upper_D=upper_D,
        lower_names=lower_names,
        upper_names=upper_names,
        groups_MD=groups_MD,
        group_least_M=group_least_M,
        group_names=group_names,
        prior_D=prior_D,
        limit=constraints.max_total_variation,
        origin_D=prior_D,
        rows_VD=rows_VD if constraints.pareto else rows_VD[:0],
        slack=constraints.pareto_slack,
        errors_VD=_cone(constraints, standard_error_VD, degrees_of_freedom, len(tasks)),
    )
    if not region._holds_hard(prior_D) and (conflict := region.hard().conflict()):
        raise InputError(f"{conflict}; relax one of them")
    return region


def _groups(
    constraints: MixtureConstraints, domains: Sequence[str]
) -> tuple[Array, Array, list[str]]:
    rows, least, names = [], [], []
    known = set(domains)
    for name, group in constraints.groups.items():
        unknown = [domain for domain in group.domains if domain not in known]
        if unknown:
            raise InputError(f"groups: {name} names domain {unknown[0]}, not in the mixture")
        member_D = np.isin(domains, list(group.domains)).astype(np.float64)
        if group.lower > 0:
            rows.append(member_D)
            least.append(group.lower)
            names.append(f"group_lower:{name}")
        if group.upper < 1:
            rows.append(-member_D)
            least.append(-group.upper)
            names.append(f"group_upper:{name}")
    return np.array(rows).reshape(len(rows), len(domains)), np.array(least), names


def _cone(
    constraints: MixtureConstraints,
    standard_error_VD: Array | None,
    degrees_of_freedom: float | None,
    V: int,
) -> Array | None:
    """κ times the standard errors, κ the quantile at 1 − δ/V."""
    if constraints.confidence is None or not constraints.pareto:
        return None
    if standard_error_VD is None:
        raise InputError(
            "confidence is set, and the influence matrix has no standard errors; give it "
            "standard_error_VD, or leave confidence out"
        )
    level = 1 - (1 - constraints.confidence) / V
    if degrees_of_freedom is None:
        return float(norm.ppf(level)) * standard_error_VD
    return float(student_t.ppf(level, degrees_of_freedom)) * standard_error_VD
