"""TiKMiX-D: the mixture that minimises the objective on a measured influence matrix."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve import conic, slsqp
from megatron_tikmix.solve.certificate import Certificate, certify
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Goal, Objective, Preset
from megatron_tikmix.solve.region import FEASIBLE, Region, region_of
from megatron_tikmix.solve.solution import MixtureSolution

Array = NDArray[np.float64]
Solver = Callable[[Objective, Region], slsqp.Answer]

SLSQP_DOMAINS = 32
"""SLSQP, whose cost grows with the cube of the domains, goes first up to so many."""

_SLSQP_MOST = 200  # beyond it SLSQP would take minutes: it is not tried at all
_FLOOR = 1e-9  # the prior's least weight where the nearest mixture to it is sought


def solve_tikmix_d(
    influence: InfluenceMatrix,
    prior: Mixture,
    goal: Goal | None = None,
    constraints: MixtureConstraints | None = None,
    *,
    preset: Preset = "default",
) -> MixtureSolution:
    """Minimise the goal, L(w) = α·std(P̂) − β·gain(P̂) − γ·diversity(w), within the constraints.

    Source: paper, section 3.3; method.md, section 2. Up to 32 domains SLSQP goes first, from the
    uniform mixture; above, and with cones, Clarabel. An answer is used only if it is certified:
    feasible to 1e-8 and within 1e-6 of the optimum by a duality gap. Otherwise the other solver
    has a try, and then the fallback is the prior, or the nearest mixture to it (in KL divergence)
    that keeps the hard constraints.

    Args:
        influence: (V, D) in the benefit sign, rows of any scale.
        prior: the mixture in force, over the same domains.
        goal: what is minimised. None: that of `preset`.
        constraints: what the answer must respect. None: those of `preset`: Pareto with `paper`,
            and none by default.
        preset: `paper`, as published, or `default`, as a run decides unless configured otherwise.

    Raises:
        InputError: `prior`, `influence` and the goal name different domains or tasks, an unknown
            preset, or hard constraints that cannot hold together.
    """
    started = time.perf_counter()
    problem = Problem.of(influence, prior, *of_preset(preset, prior, goal, constraints))
    problem, concession = problem.made_feasible()
    answer, certificate, failures = problem.minimise()
    weights_D = answer.weights_D
    if certificate is None:
        weights_D = problem.nearest_to_prior(problem.region.without_pareto())
        failures = f"{failures}; the mixture in force is kept, or the nearest that is allowed"
    # As it was given, to the last bit, where nothing moved.
    unmoved = np.array_equal(weights_D, problem.region.prior_D)
    by_name = dict(zip(problem.domains, weights_D.tolist(), strict=True))
    mixture = prior if unmoved else Mixture({name: by_name[name] for name in prior})
    return problem.describe(
        mixture,
        prior,
        order_of_tasks=influence.tasks,
        status="fallback" if certificate is None else "solved",
        reason="; ".join(
            part for part in (concession, failures if not certificate else "") if part
        ),
        certificate=certificate,
        solver=answer.solver,
        solver_message=answer.status,
        iterations=answer.iterations,
        solve_seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """What is to be minimised, within what; domains and tasks in the order of their names, so
    that the order the caller happens to use cannot matter."""

    objective: Objective
    region: Region

    @property
    def domains(self) -> Sequence[str]:
        return self.region.domains

    @property
    def tasks(self) -> Sequence[str]:
        return self.region.tasks

    @classmethod
    def of(
        cls,
        influence: InfluenceMatrix,
        prior: Mixture,
        goal: Goal,
        constraints: MixtureConstraints,
    ) -> "Problem":
        """Return the problem of :func:`solve_tikmix_d` as arrays.

        Raises:
            InputError: as there.
        """
        matrix = influence.sorted_by_name()
        objective = goal.objective(matrix)
        reference = goal.reference
        region = region_of(
            constraints,
            matrix.domains,
            matrix.tasks,
            prior.array(matrix.domains),
            objective.rows_VD,
            matrix.normalised_errors(),
            degrees_of_freedom=matrix.degrees_of_freedom,
            reference_D=None if reference is None else reference.array(matrix.domains),
        )
        return cls(objective=objective, region=region)

    def made_feasible(self) -> tuple["Problem", str]:
        """The problem where the constraints can hold together, and what had to give way for it.

        The mixture in force keeps Pareto and the limit to the change, being where both are
        measured from; so they conflict with others only if it breaks a hard constraint. Then
        Pareto gives way first, and is measured from the nearest mixture that is allowed; the
        limit gives way next, and the mixture moves as far as it must.
        """
        region = self.region
        if region.violation(region.prior_D)[0] <= FEASIBLE:
            return self, ""
        conflict = region.conflict()
        if conflict is None:
            return self, ""
        concession = f"{conflict}; Pareto is measured from the nearest mixture that is allowed"
        allowed = region.without_pareto()
        if conflict := allowed.conflict():
            allowed = allowed.hard()
            concession = f"{conflict}; the mixture moves further than its limit, as it must"
        origin_D = self.nearest_to_prior(allowed)
        moved = 0.5 * float(np.abs(origin_D - region.prior_D).sum())
        if region.limit is not None and region.limit < moved:
            # So little room, for the solvers, that it does not matter.
            region = replace(region, limit=min(1.0, moved + FEASIBLE))
        return replace(self, region=replace(region, origin_D=origin_D)), concession

    def nearest_to_prior(self, region: Region) -> Array:
        """The mixture of `region`, which must not be empty, nearest to the prior: the one of least
        KL divergence from it, so that what must be moved is spread in proportion; (D,)."""
        if region.violation(region.prior_D)[0] <= FEASIBLE:
            return region.prior_D
        reference_D = np.maximum(region.prior_D, _FLOOR)
        distance = replace(
            self.objective, alpha=0.0, beta=0.0, gamma=1.0, log_reference_D=np.log(reference_D)
        )
        return region.tidied(conic.solve(distance, region).weights_D)

    def minimise(self) -> tuple[slsqp.Answer, Certificate | None, str]:
        """The first certified answer, its certificate, and what was wrong with those before it;
        without any, the last answer and None."""
        failures = []
        for solve in self._solvers():
            answer = solve(self.objective, self.region)
            if not np.isfinite(answer.weights_D).all():
                failures.append(f"{answer.solver} returned weights that are not finite")
                continue
            answer = replace(answer, weights_D=self.region.tidied(answer.weights_D))
            certificate = certify(self.objective, self.region, answer.weights_D, answer.multipliers)
            if certificate.holds:
                return answer, certificate, ""
            worst = self.region.violation(answer.weights_D)[1]
            which = f" ({worst})" if certificate.violation > FEASIBLE else ""
            failures.append(f"{answer.solver} is not certified: {certificate}{which}")
        return answer, None, "; ".join(failures)

    def _solvers(self) -> Iterator[Solver]:
        D, region = len(self.domains), self.region
        if not (region.lower_D < region.upper_D).any():
            yield slsqp.solve  # nothing is left to decide, and it sees that
        elif D <= SLSQP_DOMAINS and region.errors_VD is None:
            yield from (slsqp.solve, conic.solve)
        else:
            yield conic.solve
            if D <= _SLSQP_MOST:
                yield slsqp.solve
        yield partial(conic.solve, regularization=1e-8)

    def _prior_violation(self) -> float:
        violation, _ = self.region.hard().violation(self.region.prior_D)
        return violation if violation > FEASIBLE else 0.0

    def describe(
        self, mixture: Mixture, prior: Mixture, order_of_tasks: Sequence[str], **facts: Any
    ) -> MixtureSolution:
        """The solution, with the fields that follow from the mixture."""
        objective, weights_D = self.objective, mixture.array(self.domains)
        before_V = objective.rows_VD @ prior.array(self.domains)
        after_V = objective.rows_VD @ weights_D
        before = dict(zip(self.tasks, before_V.tolist(), strict=True))
        after = dict(zip(self.tasks, after_V.tolist(), strict=True))
        slacks = self.region.slacks(weights_D)
        return MixtureSolution(
            mixture=mixture,
            objective=objective.value(weights_D),
            uniformity=objective.uniformity(after_V)[0],
            gain=objective.gain(after_V)[0],
            diversity=objective.diversity(weights_D)[0],
            effective_domains=mixture.effective_domains,
            gain_before={task: before[task] for task in order_of_tasks},
            gain_after={task: after[task] for task in order_of_tasks},
            total_variation=prior.total_variation(mixture),
            prior_violation=self._prior_violation(),
            active_constraints=[name for name, slack in slacks.items() if slack <= FEASIBLE],
            **facts,
        )


def of_preset(
    preset: Preset, prior: Mixture, goal: Goal | None, constraints: MixtureConstraints | None
) -> tuple[Goal, MixtureConstraints]:
    """Return the goal and the constraints, with those that are None given by the preset.

    Raises:
        InputError: an unknown preset.
    """
    of_it = Goal.of_preset(preset, prior)
    return goal or of_it, constraints or MixtureConstraints(pareto=preset == "paper")
