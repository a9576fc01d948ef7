"""The same problem in conic form, for Clarabel: an interior-point solver whose cost grows far
slower with the number of domains than SLSQP's, and which takes Pareto's cones as they are.

Variables are the weights w that are free, and

    P̂ = rows_VD w                         (so that the dense rows stand there once)
    h_j ≥ w_j ln w_j                      (exponential cones)
    s ≥ std(P̂) = ‖√u ∘ (P̂ − m)‖           (second-order cone)
    t_j ≥ max(w_j − prior_j, 0)           (total variation)
    l_i ≤ ln(P̂_i − b_i), b_i ≤ 0          (exponential cones; the logarithmic gain is the most that
                                           1 + l_i + b_i / 0.05 can be)
"""

from collections.abc import Sequence

import clarabel
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from megatron_tikmix.solve.certificate import Multipliers
from megatron_tikmix.solve.objective import LOG_FLOOR, Objective
from megatron_tikmix.solve.region import Region
from megatron_tikmix.solve.slsqp import Answer

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_TOLERANCE = 1e-11

REGULARIZATION = 1e-10
"""Clarabel's own default, 1e-8, leaves gaps up to 2e-6 on mixtures of many domains; less than
1e-10 makes some solutions fail."""


class _Program:
    """minimise cost·x  subject to  rhs − A x in a product of cones; built block by block."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._blocks: list[sparse.sparray] = []
        self._rhs: list[Array] = []
        self._cones: list[object] = []
        self._rows = 0

    def columns(self, variable: int) -> slice:
        return slice(self._starts[variable], self._starts[variable + 1])

    def add(self, cone: object, rhs: Array, **by_variable: sparse.sparray) -> slice:
        """One cone (or several of one kind, given as a list); the rows it takes."""
        columns = []
        for variable in range(len(self._starts) - 1):
            width = self._starts[variable + 1] - self._starts[variable]
            block = by_variable.get(f"x{variable}", sparse.csr_array((len(rhs), width)))
            columns.append(block)
        self._blocks.append(sparse.hstack(columns, format="csc"))
        self._rhs.append(rhs)
        self._cones += cone if isinstance(cone, list) else [cone]
        self._rows += len(rhs)
        return slice(self._rows - len(rhs), self._rows)

    def solve(self, cost: Array, regularization: float) -> clarabel.DefaultSolution:
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.max_threads = 1
        settings.presolve_enable = False
        settings.static_regularization_constant = regularization
        settings.iterative_refinement_reltol = settings.iterative_refinement_abstol = 1e-15
        settings.iterative_refinement_max_iter = 50
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = _TOLERANCE
        n = self._starts[-1]
        return clarabel.DefaultSolver(
            sparse.csc_matrix((n, n)),
            cost,
            sparse.csc_matrix(sparse.vstack(self._blocks, format="csc")),
            np.concatenate(self._rhs),
            self._cones,
            settings,
        ).solve()


def solve(
    objective: Objective, region: Region, *, regularization: float = REGULARIZATION
) -> Answer:
    """Minimise L over the region."""
    # A weight without room has no interior, which the method needs: it becomes a constant.
    free_D = region.upper_D - region.lower_D > 1e-12
    held_D = np.where(free_D, 0.0, region.lower_D)
    D, F, V = len(free_D), int(free_D.sum()), len(objective.rows_VD)
    limited = region.limit is not None
    logged = _logged(objective)
    program = _Program(
        [
            *(F, F if objective.gamma > 0 else 0, int(objective.alpha > 0), F * limited, V),
            *(len(logged), len(logged)),
        ]
    )
    eye_FF = sparse.eye_array(F, format="csr")

    program.add(
        clarabel.ZeroConeT(V),
        -objective.rows_VD @ held_D,
        x0=sparse.csr_array(objective.rows_VD[:, free_D]),
        x4=-sparse.eye_array(V),
    )
    program.add(
        clarabel.ZeroConeT(1),
        np.array([1 - held_D.sum()]),
        x0=sparse.csr_array(np.ones((1, F))),
    )
    inequalities = _inequalities(region, free_D, held_D)
    rows = {}
    for name, (rhs, blocks) in inequalities.items():
        if len(rhs):
            rows[name] = program.add(clarabel.NonnegativeConeT(len(rhs)), rhs, **blocks)
    if objective.alpha > 0:
        root_V = np.sqrt(objective.task_weights_V)
        centring_VV = root_V[:, None] * (np.eye(V) - objective.task_weights_V)
        rows["std"] = program.add(
            clarabel.SecondOrderConeT(V + 1),
            np.zeros(V + 1),
            x2=sparse.csr_array(np.concatenate([[-1.0], np.zeros(V)])[:, None]),
            x4=sparse.vstack([sparse.csr_array((1, V)), sparse.csr_array(-centring_VV)]),
        )
    if region.errors_VD is not None:
        least_V = region.rows_VD @ region.origin_D - region.slack
        for i, error_D in enumerate(region.errors_VD):
            diagonal_DF = sparse.diags_array(error_D, format="csc")[:, free_D]
            rows[f"cone{i}"] = program.add(
                clarabel.SecondOrderConeT(D + 1),
                np.concatenate([[-least_V[i]], error_D * (held_D - region.origin_D)]),
                x0=sparse.vstack([sparse.csr_array((1, F)), -diagonal_DF]),
                x4=sparse.csr_array(([-1.0], ([0], [i])), shape=(D + 1, V)),
            )
    if objective.gamma > 0:
        pick_h = sparse.kron(eye_FF, np.array([[1.0], [0.0], [0.0]]))
        pick_w = sparse.kron(eye_FF, np.array([[0.0], [-1.0], [0.0]]))
        program.add(
            [clarabel.ExponentialConeT()] * F,
            np.tile([0.0, 0.0, 1.0], F),
            x0=pick_w,
            x1=pick_h,
        )
    if len(logged):
        _add_logarithms(program, logged, V)
    solution = program.solve(_cost(objective, program, free_D), regularization)
    weights_D = held_D.copy()
    weights_D[free_D] = np.asarray(solution.x)[program.columns(0)]
    return Answer(
        weights_D,
        _multipliers(objective, region, np.asarray(solution.z), rows),
        solver="clarabel",
        status=str(solution.status),
        iterations=int(solution.iterations),
    )


def _logged(objective: Objective) -> NDArray[np.int64]:
    """The tasks whose gain counts by its logarithm."""
    used = objective.gain_kind == "log" and objective.beta > 0
    return np.flatnonzero(objective.task_weights_V > 0) if used else np.zeros(0, dtype=np.int64)


def _add_logarithms(program: _Program, logged: NDArray[np.int64], V: int) -> None:
    """Cones (l_i, 1, P̂_i − b_i), and b_i ≤ 0."""
    N = len(logged)
    eye_NN = sparse.eye_array(N, format="csr")
    pick_NV = sparse.csr_array((np.ones(N), (np.arange(N), logged)), shape=(N, V))
    last = np.array([[0.0], [0.0], [1.0]])
    program.add(clarabel.NonnegativeConeT(N), np.zeros(N), x6=eye_NN)
    program.add(
        [clarabel.ExponentialConeT()] * N,
        np.tile([0.0, 1.0, 0.0], N),
        x4=-sparse.kron(pick_NV, last),
        x5=-sparse.kron(eye_NN, last[::-1]),
        x6=sparse.kron(eye_NN, last),
    )


def _cost(objective: Objective, program: _Program, free_D: Mask) -> Array:
    cost = np.zeros(program.columns(6).stop)
    scale_V = objective.beta * objective.gain_scale * objective.task_weights_V
    slope_D = np.zeros(len(free_D))
    if objective.gain_kind == "linear":
        slope_D = -(scale_V @ objective.rows_VD)
    logged = _logged(objective)
    cost[program.columns(5)] = -scale_V[logged]
    cost[program.columns(6)] = -scale_V[logged] / LOG_FLOOR
    if objective.log_reference_D is not None:
        slope_D = slope_D - objective.gamma * objective.log_reference_D
    cost[program.columns(0)] = slope_D[free_D]
    cost[program.columns(1)] = objective.gamma
    cost[program.columns(2)] = objective.alpha
    return cost


def _inequalities(
    region: Region, free_D: Mask, held_D: Array
) -> dict[str, tuple[Array, dict[str, sparse.sparray]]]:
    """Right-hand sides and blocks of everything linear, by the kind of constraint."""
    eye_FF = sparse.eye_array(int(free_D.sum()), format="csr")
    lower_F, upper_F = region.lower_D[free_D], region.upper_D[free_D]
    blocks: dict[str, tuple[Array, dict[str, sparse.sparray]]] = {
        "lower": (-lower_F, {"x0": -eye_FF}),
        "upper": (upper_F[upper_F < 1], {"x0": eye_FF[upper_F < 1]}),
        "groups": (
            region.groups_MD @ held_D - region.group_least_M,
            {"x0": sparse.csr_array(-region.groups_MD[:, free_D])},
        ),
    }
    if region.limit is not None:
        gained = np.maximum(held_D - region.prior_D, 0)[~free_D].sum()
        blocks["gained"] = (region.prior_D[free_D], {"x0": eye_FF, "x3": -eye_FF})
        blocks["gained0"] = (0 * lower_F, {"x3": -eye_FF})
        blocks["change"] = (
            np.array([region.limit - gained]),
            {"x3": sparse.csr_array(np.ones((1, len(lower_F))))},
        )
    if region.errors_VD is None:
        least_V = region.rows_VD @ region.origin_D - region.slack
        blocks["pareto"] = (-least_V, {"x4": -sparse.eye_array(len(least_V))})
    return blocks


def _multipliers(
    objective: Objective, region: Region, duals: Array, rows: dict[str, slice]
) -> Multipliers:
    V = len(objective.rows_VD)
    std_V = np.zeros(V)
    if "std" in rows:
        # α·s less the cone's part: z of std(P̂) ≥ zᵀP̂, up to the centring.
        scaled_V = -duals[rows["std"]][1:] / objective.alpha
        std_V = np.sqrt(objective.task_weights_V) * scaled_V
        std_V -= objective.task_weights_V * std_V.sum()
    pareto_V, cones_VD = np.zeros(len(region.rows_VD)), None
    if region.errors_VD is not None:
        cones = np.array([duals[rows[f"cone{i}"]] for i in range(len(pareto_V))])
        cones = cones.reshape(len(pareto_V), -1)
        pareto_V, cones_VD = cones[:, 0], cones[:, 1:]
    elif "pareto" in rows:
        pareto_V = duals[rows["pareto"]]
    groups_M = duals[rows["groups"]] if "groups" in rows else np.zeros(0)
    change = float(duals[rows["change"]][0]) if "change" in rows else 0.0
    return Multipliers(std_V, groups_M, change, pareto_V, cones_VD)
