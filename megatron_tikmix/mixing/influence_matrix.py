"""InfluenceMatrix: what training on each domain does to each validation task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceMatrix:
    """S_VD with its names, in the BENEFIT sign: positive means that training on the domain
    lowers the task's loss.

    The paper's formula gives the opposite sign; this is the only one used here. The unit is
    whatever the curvature made it, and differs from row to row (see method.md, section 1).

    Raises:
        InputError: shapes that do not fit the names, names that repeat, an entry that is NaN or
            infinite, or a negative standard error.
    """

    values_VD: Array
    """float64 (V, D), read-only; anything array-like is accepted."""

    domains: Sequence[str]
    tasks: Sequence[str]

    standard_error_VD: Array | None = None
    """Standard errors of the values, the same shape and units; None when not known."""

    degrees_of_freedom: float | None = None
    """Of the standard errors, for Student's t (one less than the sub-batches of a domain); None:
    the errors are taken as known."""

    def __post_init__(self) -> None:
        for field, names in (("domains", self.domains), ("tasks", self.tasks)):
            if not names or len(set(names)) < len(names):
                raise InputError(f"influence: {field} must be names, each once; got {list(names)}")
            object.__setattr__(self, field, tuple(names))
        object.__setattr__(self, "values_VD", self._checked("value", self.values_VD))
        if self.standard_error_VD is not None:
            errors_VD = self._checked("standard error", self.standard_error_VD)
            if (errors_VD < 0).any():
                raise InputError("influence: a standard error is negative; it must be 0 or more")
            object.__setattr__(self, "standard_error_VD", errors_VD)
        if self.degrees_of_freedom is not None and not self.degrees_of_freedom > 0:
            raise InputError(
                f"influence: degrees_of_freedom is {self.degrees_of_freedom}; it must be positive"
            )

    def _checked(self, what: str, given: ArrayLike) -> Array:
        array_VD = np.array(given, dtype=np.float64)
        expected = (len(self.tasks), len(self.domains))
        if array_VD.shape != expected:
            raise InputError(
                f"influence: the {what}s have shape {array_VD.shape}; {expected[0]} tasks and "
                f"{expected[1]} domains need {expected}"
            )
        for v, d in np.argwhere(~np.isfinite(array_VD))[:1]:
            raise InputError(
                f"influence: the {what} of domain {self.domains[d]} on task {self.tasks[v]} is "
                f"{array_VD[v, d]}; check that the probe's losses and gradients are finite"
            )
        array_VD.flags.writeable = False
        return array_VD

    def sorted_by_name(self) -> "InfluenceMatrix":
        """The same matrix with domains and tasks in the order of their names."""
        tasks, domains = sorted(self.tasks), sorted(self.domains)
        order = np.ix_(
            [self.tasks.index(name) for name in tasks],
            [self.domains.index(name) for name in domains],
        )
        errors_VD = self.standard_error_VD
        return InfluenceMatrix(
            self.values_VD[order],
            domains=domains,
            tasks=tasks,
            standard_error_VD=None if errors_VD is None else errors_VD[order],
            degrees_of_freedom=self.degrees_of_freedom,
        )

    @property
    def scale_V(self) -> Array:
        """n_i = max_j |S_ij| of each task, (V,); 1 for a row of zeros. The answer of the solvers
        does not change when a row is scaled."""
        largest_V: Array = np.abs(self.values_VD).max(axis=1)
        return np.where(largest_V > 0, largest_V, 1.0)

    def normalised_errors(self) -> Array | None:
        """Standard errors of the rows over their scale, (V, D); those of a row of zeros, which
        drops out, are 0."""
        if self.standard_error_VD is None:
            return None
        errors_VD: Array = self.standard_error_VD / self.scale_V[:, None]
        kept_V1 = np.abs(self.values_VD).max(axis=1, keepdims=True) > 0
        return np.where(kept_V1, errors_VD, 0.0)

    def to_json(self) -> dict[str, Any]:
        """``{"influence": {task: {domain: value}}, "influence_se": the same or None,
        "influence_df": number or None}``, the keys of the ledger."""
        errors_VD = self.standard_error_VD
        return {
            "influence": self._nested(self.values_VD),
            "influence_se": None if errors_VD is None else self._nested(errors_VD),
            "influence_df": self.degrees_of_freedom,
        }

    def _nested(self, array_VD: Array) -> dict[str, dict[str, float]]:
        rows = zip(self.tasks, array_VD.tolist(), strict=True)
        return {task: dict(zip(self.domains, row, strict=True)) for task, row in rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "InfluenceMatrix":
        """Undo :meth:`to_json`; a whole row of the ledger will do.

        Raises:
            InputError: tasks that name different domains, or any of the class's own reasons.
        """
        values, errors = data["influence"], data.get("influence_se")
        tasks = list(values)
        domains = list(values[tasks[0]]) if tasks else []

        def array_VD(of_task: Mapping[str, Mapping[str, float]]) -> ArrayLike:
            if set(of_task) != set(tasks) or any(set(of_task[t]) != set(domains) for t in tasks):
                raise InputError("influence: every task must name the same domains")
            return [[of_task[task][domain] for domain in domains] for task in tasks]

        return cls(
            np.array(array_VD(values)),
            domains=domains,
            tasks=tasks,
            standard_error_VD=None if errors is None else np.array(array_VD(errors)),
            degrees_of_freedom=data.get("influence_df"),
        )

    def __repr__(self) -> str:
        """A table: a line per domain, a column per task, ± one standard error."""
        cells = [["", *self.tasks]]
        for d, domain in enumerate(self.domains):
            cells.append([domain, *(self._cell(v, d) for v in range(len(self.tasks)))])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in cells
        )
        return "InfluenceMatrix (positive: lowers the task's loss)\n" + "\n".join(lines)

    def _cell(self, v: int, d: int) -> str:
        errors_VD = self.standard_error_VD
        error = "" if errors_VD is None else f" ± {errors_VD[v, d]:.1g}"
        return f"{self.values_VD[v, d]:+.3g}{error}"
