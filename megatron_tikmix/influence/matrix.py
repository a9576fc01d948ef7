"""InfluenceMatrix: the effect of training on each domain on each validation task.

Influence S_ij looks at one domain at a time, and credits it with all of its gradient's component
along the task's. So two near-duplicates are both credited in full, and a text of the right words in
the wrong order as much as the real one, since early in training most of a gradient is about word
frequencies. Fitted jointly, domains share the credit (:func:`joint_influence`). With the gradients
g_j of the domains and f_i of the task, and in the metric of the curvature, a step along Σ_j a_j g_j
lowers the loss, to second order, by

    s_iᵀa − ½ aᵀG a      s_ij = ⟨f_i, g_j⟩,  G_jk = ⟨g_j, g_k⟩

where the Hessian is assumed to act on these few directions as the metric does. Its maximum over
a ≥ 0 is the non-negative least squares fit of f_i by the g_j: the joint influence.

Averaging over boundaries (:class:`FormerInfluence`) reduces the noise of S, but the average lags
behind.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from megatron_tikmix.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class InfluenceMatrix:
    """S_VD with its names, in the BENEFIT sign: positive means that training on the domain
    lowers the task's loss.

    The paper's formula gives the opposite sign, which is not used here. The unit depends on the
    curvature, and differs from row to row (see method.md, section 1).

    Raises:
        InputError: shapes do not fit the names, names repeat, an entry is NaN or infinite, or a
            standard error is negative.
    """

    values_VD: Array
    """float64 (V, D), read-only; anything array-like is accepted."""

    domains: Sequence[str]
    tasks: Sequence[str]

    standard_error_VD: Array | None = None
    """Standard errors of the values, the same shape and units; None when not known."""

    degrees_of_freedom: float | None = None
    """Degrees of freedom of the standard errors, for Student's t (one less than a domain's
    sub-batches); None: the errors are taken as exact."""

    recorded: bool = False
    """True for a matrix read from a ledger, which may hold NaN and is for display only."""

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
        lost = np.zeros_like(array_VD) if self.recorded else ~np.isfinite(array_VD)
        for v, d in np.argwhere(lost)[:1]:
            raise InputError(
                f"influence: the {what} of domain {self.domains[d]} on task {self.tasks[v]} is "
                f"{array_VD[v, d]}; check that the probe's losses and gradients are finite"
            )
        array_VD.flags.writeable = False
        return array_VD

    def sorted_by_name(self) -> "InfluenceMatrix":
        """Return the matrix with domains and tasks in the order of their names."""
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
        """The scale n_i = max_j |S_ij| of each task, (V,); 1 for a row of zeros. Solutions do not
        depend on it."""
        largest_V: Array = np.abs(self.values_VD).max(axis=1)
        return np.where(largest_V > 0, largest_V, 1.0)

    def normalised_errors(self) -> Array | None:
        """Return the rows' standard errors over their scale, (V, D); 0 for a row of zeros, which
        has no part in a solution."""
        if self.standard_error_VD is None:
            return None
        errors_VD: Array = self.standard_error_VD / self.scale_V[:, None]
        kept_V1 = np.abs(self.values_VD).max(axis=1, keepdims=True) > 0
        return np.where(kept_V1, errors_VD, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return ``{"influence": {task: {domain: value}}, "influence_se": the same or None,
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
        """Undo :meth:`to_json`; `data` may be a whole row of the ledger. None becomes NaN.

        Raises:
            InputError: tasks name different domains, or as for the class.
        """
        values, errors = data["influence"], data.get("influence_se")
        tasks = list(values)
        domains = list(values[tasks[0]]) if tasks else []

        def array_VD(of_task: Mapping[str, Mapping[str, float | None]]) -> Array:
            if set(of_task) != set(tasks) or any(set(of_task[t]) != set(domains) for t in tasks):
                raise InputError("influence: every task must name the same domains")
            rows = [[of_task[task][domain] for domain in domains] for task in tasks]
            return np.array(rows, dtype=np.float64)

        values_VD, errors_VD = array_VD(values), None if errors is None else array_VD(errors)
        known = [array for array in (values_VD, errors_VD) if array is not None]
        return cls(
            values_VD,
            domains=domains,
            tasks=tasks,
            standard_error_VD=errors_VD,
            degrees_of_freedom=data.get("influence_df"),
            recorded=not all(np.isfinite(array).all() for array in known),
        )

    def __repr__(self) -> str:
        """Return a table: a line per domain, a column per task, ± one standard error."""
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


OWN_ROW = "domain:"
"""Prefix of the rows that hold influence on a domain instead of a task: fresh samples of it."""

_RIDGE = 0.01  # times the mean ⟨g_j, g_j⟩ is added to G's diagonal, against noise in G


def joint_influence(influence: InfluenceMatrix) -> InfluenceMatrix:
    """Return the non-negative least squares fit of each task's gradient by those of the domains.

    Args:
        influence: (V + D, D): rows of tasks, and for each domain the row ``domain:<name>`` with
            the inner products of its gradient, on samples of their own, with those of all
            domains. This avoids the bias of squaring a noisy gradient.

    Returns:
        a_VD ≥ 0, one row for each task: the gradient of a token of the task is fitted by those of
        a_ij tokens of each domain j. Domains without an own row are left out. Errors are those of
        the fit on the domains with a_ij > 0, with G taken as exact, and 0 for the others. Without
        any own row, `influence` itself.
    """
    if not has_own_rows(influence):
        return influence
    own = {name.removeprefix(OWN_ROW) for name in influence.tasks if name.startswith(OWN_ROW)}
    domains = [name for name in influence.domains if name in own]
    tasks = [name for name in influence.tasks if not name.startswith(OWN_ROW)]
    columns = [influence.domains.index(name) for name in domains]

    def rows(names: list[str], array_VD: Array) -> Array:
        return array_VD[np.ix_([influence.tasks.index(name) for name in names], columns)]

    gram_DD = rows([OWN_ROW + name for name in domains], influence.values_VD)
    root_DD, gram_DD = _square_root((gram_DD + gram_DD.T) / 2)
    inverse_root_DD = np.linalg.inv(root_DD)
    given_VD = rows(tasks, influence.values_VD)
    # ‖root a − root⁻¹ s‖² = aᵀG a − 2 sᵀa + a constant
    fits_VD = np.array([nnls(root_DD, inverse_root_DD @ given_D)[0] for given_D in given_VD])
    errors_VD = influence.standard_error_VD
    return InfluenceMatrix(
        fits_VD,
        domains=domains,
        tasks=tasks,
        standard_error_VD=(
            None if errors_VD is None else _errors(fits_VD, gram_DD, rows(tasks, errors_VD))
        ),
        degrees_of_freedom=influence.degrees_of_freedom,
    )


def has_own_rows(influence: InfluenceMatrix) -> bool:
    """Return whether there are own rows of domains, as joint influence needs them."""
    return any(name.startswith(OWN_ROW) for name in influence.tasks)


def _square_root(gram_DD: Array) -> tuple[Array, Array]:
    """Return the symmetric square root of G with a ridge, and that matrix itself."""
    values_D, vectors_DD = np.linalg.eigh(gram_DD)
    ridge = _RIDGE * max(float(np.abs(np.diag(gram_DD)).mean()), 1e-300)
    values_D = np.maximum(values_D, 0.0) + ridge
    return (
        (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T,
        (vectors_DD * values_D) @ vectors_DD.T,
    )


def _errors(fits_VD: Array, gram_DD: Array, errors_VD: Array) -> Array:
    """Return the errors of each fit, from those of s and the inverse of G where a > 0."""
    found_VD = np.zeros_like(fits_VD)
    for fit_D, error_D, found_D in zip(fits_VD, errors_VD, found_VD, strict=True):
        kept = np.flatnonzero(fit_D > 0)
        if len(kept):
            inverse = np.linalg.inv(gram_DD[np.ix_(kept, kept)])
            found_D[kept] = np.sqrt((inverse**2) @ error_D[kept] ** 2)
    return found_VD


FORGOTTEN = 2.0**-60
"""Former boundaries with a smaller coefficient, less than rounding, are left out of an average."""


def smoothed(history: Sequence[InfluenceMatrix], smoothing: float) -> InfluenceMatrix:
    """Return the exponential moving average of the normalised rows of `history`, the latest last.

    See :class:`FormerInfluence`.
    """
    *former, latest = history
    return FormerInfluence(former, smoothing, latest.tasks, latest.domains).averaged_with(latest)


class FormerInfluence:
    """The weighted sum of former boundaries' matrices, computed once for several averages.

    With s = `smoothing`, row i of an average is n_i · Σ_k c_k · (row i of boundary k, over its own
    n), where c_k ∝ sᵏ for the boundary k before the latest, Σ c = 1. Rows are normalised first
    since gradients shrink as the model learns, so that the first boundaries would dominate an
    average of raw rows. Standard errors are those of a weighted sum of independent estimates.

    Args:
        former: one matrix for each former boundary, in their order. Those that lack a task or a
            domain of the latest, or have a c_k below 2⁻⁶⁰, are left out.
        smoothing: 0 (the latest alone) to below 1.
        tasks, domains: those of the latest matrix.
    """

    def __init__(
        self,
        former: Sequence[InfluenceMatrix],
        smoothing: float,
        tasks: Sequence[str],
        domains: Sequence[str],
    ) -> None:
        self._names = tuple(tasks), tuple(domains)
        usable = [
            matrix
            for matrix in former
            if set(matrix.domains) >= set(domains) and set(matrix.tasks) >= set(tasks)
        ]
        usable = usable[len(usable) - min(len(usable), most_remembered(smoothing)) :]
        coefficients = smoothing ** np.arange(len(usable) + 1)[::-1] if smoothing else np.ones(1)
        coefficients = coefficients / coefficients.sum()
        shape = len(tasks), len(domains)
        self._values_VD, self._variance_VD = np.zeros(shape), np.zeros(shape)
        for c, matrix in zip(coefficients.tolist(), usable, strict=False):
            self._add(c, matrix, self._values_VD, self._variance_VD)
        self._latest = coefficients.tolist()[-1]

    def averaged_with(self, latest: InfluenceMatrix) -> InfluenceMatrix:
        """Return the average of the former boundaries and this one, in the units of this one."""
        if (latest.tasks, latest.domains) != self._names:
            raise ValueError("the latest matrix has other tasks or domains than announced")
        values_VD, variance_VD = self._values_VD.copy(), self._variance_VD.copy()
        self._add(self._latest, latest, values_VD, variance_VD)
        scale_V1 = latest.scale_V[:, None]
        known = latest.standard_error_VD is not None
        return InfluenceMatrix(
            values_VD * scale_V1,
            domains=latest.domains,
            tasks=latest.tasks,
            standard_error_VD=np.sqrt(variance_VD) * scale_V1 if known else None,
            degrees_of_freedom=latest.degrees_of_freedom,
        )

    def _add(self, c: float, matrix: InfluenceMatrix, values_VD: Array, variance_VD: Array) -> None:
        tasks, domains = self._names
        task_at = {name: v for v, name in enumerate(matrix.tasks)}
        domain_at = {name: d for d, name in enumerate(matrix.domains)}
        order = np.ix_([task_at[name] for name in tasks], [domain_at[name] for name in domains])
        scale_V1 = matrix.scale_V[order[0][:, 0], None]
        values_VD += c * matrix.values_VD[order] / scale_V1
        errors_VD = matrix.normalised_errors()
        if errors_VD is not None:
            variance_VD += (c * errors_VD[order]) ** 2


def most_remembered(smoothing: float) -> int:
    """Return the largest number of former boundaries that an average includes."""
    return int(math.log(FORGOTTEN) / math.log(smoothing)) if smoothing else 0


def completed(
    influence: InfluenceMatrix, domains: Sequence[str], tasks: Sequence[str] = ()
) -> InfluenceMatrix:
    """Return the matrix with the missing domains and tasks added, at influence 0."""
    more_domains = [name for name in domains if name not in influence.domains]
    more_tasks = [name for name in tasks if name not in influence.tasks]
    if not more_domains and not more_tasks:
        return influence
    padding = ((0, len(more_tasks)), (0, len(more_domains)))
    errors_VD = influence.standard_error_VD
    return InfluenceMatrix(
        np.pad(influence.values_VD, padding),
        domains=[*influence.domains, *more_domains],
        tasks=[*influence.tasks, *more_tasks],
        standard_error_VD=None if errors_VD is None else np.pad(errors_VD, padding),
        degrees_of_freedom=influence.degrees_of_freedom,
    )
