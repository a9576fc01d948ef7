"""Joint influence: how much of each domain a task's gradient is made of.

Influence S_ij looks at one domain at a time: whatever points a task's way is credited with all of
it. A near-duplicate is credited twice, and a text of the right words in the wrong order as much as
the real one, for early in training most of a gradient is about which words there are. Asked
together, domains share the credit. With the gradients g_j of the domains and f_i of the task, and
in the metric of the curvature, a step along Σ_j a_j g_j lowers the loss, to second order, by

    s_iᵀa − ½ aᵀG a      s_ij = ⟨f_i, g_j⟩,  G_jk = ⟨g_j, g_k⟩

where the Hessian is taken to act on these few directions as the metric does. The most it can be
with a ≥ 0 is at the non-negative least squares fit of f_i by the g_j: the joint influence.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from megatron_tikmix.mixing.influence_matrix import InfluenceMatrix

Array = NDArray[np.float64]

OWN_ROW = "domain:"
"""A row of this and a domain's name holds its influence on fresh samples of that domain itself."""

_RIDGE = 0.01  # of the mean ⟨g_j, g_j⟩: what a fit has to be worth for the noise of G


def joint_influence(influence: InfluenceMatrix) -> InfluenceMatrix:
    """The non-negative least squares fit of each task's gradient by those of the domains.

    Args:
        influence: (V + D, D): rows of tasks, and for each domain the row ``domain:<name>`` with
            the inner products of its gradient, on samples of their own, with those of all
            domains. So G is measured without the bias that squaring a noisy gradient has.

    Returns:
        a_VD ≥ 0, rows of the tasks: a_ij tokens of domain j point where a token of the task does.
        A domain without its own row is left out. Errors are those of the fit on the domains that
        are in it, G taken as known; 0 for the others. Without any own row, `influence` itself.
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
    # ‖root a − root⁻¹ s‖² is aᵀG a − 2 sᵀa and a constant.
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
    """Whether domains have their own rows, so that their joint influence is known."""
    return any(name.startswith(OWN_ROW) for name in influence.tasks)


def _square_root(gram_DD: Array) -> tuple[Array, Array]:
    """The symmetric root of G with a ridge, and what it is the root of."""
    values_D, vectors_DD = np.linalg.eigh(gram_DD)
    ridge = _RIDGE * max(float(np.abs(np.diag(gram_DD)).mean()), 1e-300)
    values_D = np.maximum(values_D, 0.0) + ridge
    return (
        (vectors_DD * np.sqrt(values_D)) @ vectors_DD.T,
        (vectors_DD * values_D) @ vectors_DD.T,
    )


def _errors(fits_VD: Array, gram_DD: Array, errors_VD: Array) -> Array:
    """Standard errors of each fit: those of s through the inverse of G on the domains in it."""
    found_VD = np.zeros_like(fits_VD)
    for fit_D, error_D, found_D in zip(fits_VD, errors_VD, found_VD, strict=True):
        kept = np.flatnonzero(fit_D > 0)
        if len(kept):
            inverse = np.linalg.inv(gram_DD[np.ix_(kept, kept)])
            found_D[kept] = np.sqrt((inverse**2) @ error_D[kept] ** 2)
    return found_VD
