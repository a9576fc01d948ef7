"""Why a domain's weight is what it is: the terms of the objective that push it up or down.

At a mixture w the objective L (see :class:`~megatron_tikmix.solve.objective.Objective`) pushes
domain j by

    −∂L/∂w_j = β Σ_i gain'_i R_ij  −  α Σ_i std'_i R_ij  +  γ diversity'_j

with R the normalised influence rows. Only differences between domains can move a mixture, so each
term is given relative to its mean over the mixture. At the optimum the terms and what the active
constraints push add up to 0: nothing is left that would move the weight.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.monitoring.answers import known, measured
from megatron_tikmix.monitoring.files import Row
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.words import Array, Influence, clean
from megatron_tikmix.solve.objective import Objective

# The change of a domain's weight at a boundary, as a sum of parts.
#
# At the optimum what pushes a weight adds up to 0, and the push of diversity, relative to its mean
# over the mixture w, is −γ (ln w_j/r_j − KL(w ‖ r)) with r the reference mixture. So with the
# weight before, v_j, and what gain, uniformity and active constraints push, g_ij, u_j and c_j,
#
# ln w_j/v_j = (Σ_i g_ij + u_j + c_j) / γ  +  ln r_j/v_j  +  KL(w ‖ r)
#
# exactly. Times the logarithmic mean of w_j and v_j, which is (w_j − v_j) / ln(w_j/v_j), each term
# becomes its part of the change of the weight, and they add up to it: the logarithmic mean Divisia
# index, B. W. Ang, Energy Policy 32 (2004) 1131.


TINY = 1e-12
"""A weight below it has no logarithm to speak of, and a change to or from it no parts."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """What made the solver's answer differ from the mixture before, in weight.

    All but `noise` add up to `total`.
    """

    gain: dict[str, float]
    """By task."""

    uniformity: float
    constraints: float

    diversity: float
    """Towards the reference mixture; 0 where that is the mixture before."""

    shared: float
    """What every domain's weight is multiplied by alike, so that weights sum to 1."""

    total: float
    """The answer's weight less the weight before."""

    noise: float | None
    """Standard error of gain and uniformity together, at most, at the answer."""


def decomposed(
    before: float,
    answer: float,
    *,
    gain: Mapping[str, float | None],
    uniformity: float | None,
    constraints: float | None,
    noise: float | None,
    reference: float,
    divergence: float,
    gamma: float,
) -> Change | None:
    """The change from `before` to `answer` in its parts; None where one of them is not known.

    Args:
        gain, uniformity, constraints, noise: pushes, in units of the objective per unit of weight.
        reference: the domain's weight in the mixture that diversity is measured from.
        divergence: KL(answer ‖ reference), of the mixtures.
        gamma: weight of the diversity term.
    """
    known = {task: push for task, push in gain.items() if push is not None}
    if uniformity is None or constraints is None or len(known) < len(gain):
        return None
    if gamma <= 0 or min(before, answer, reference) < TINY or not math.isfinite(divergence):
        return None
    mean = _logarithmic_mean(before, answer)
    return Change(
        gain={task: mean * push / gamma for task, push in known.items()},
        uniformity=mean * uniformity / gamma,
        constraints=mean * constraints / gamma,
        diversity=mean * math.log(reference / before),
        shared=mean * divergence,
        total=answer - before,
        noise=None if noise is None else mean * noise / gamma,
    )


def _logarithmic_mean(a: float, b: float) -> float:
    """(a − b) / (ln a − ln b), and a where they are equal."""
    ratio = math.log(a / b)
    return a if abs(ratio) < 1e-9 else (a - b) / ratio


KINK = 1e-5
"""Below it std(P̂), over the largest |P̂|, is 0 as far as a solver can tell: tasks gain alike."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What pushed one domain's weight at one boundary; positive pushes it up.

    All pushes are in units of the objective per unit of weight, at the mixture that was solved
    for, relative to the mean over that mixture.
    """

    domain: str
    stage: int
    iteration: int
    source: str | None
    reason: str | None

    before: float
    """Weight in the stage before."""

    solved: float
    """Weight in the solver's answer, which is not followed where the mixture was kept."""

    after: float
    """Weight in the stage."""

    gain: dict[str, float | None]
    """By task: what the domain's influence on it is worth."""

    uniformity: float | None
    """Of gains over tasks: up for a domain that serves the tasks that gain least. None where all
    gain alike: std has no slope there, and pushes whatever keeps it so."""

    diversity: float | None
    """Entropy, or the pull towards the reference mixture: up for a weight below it."""

    constraints: float | None
    """What the active constraints push: the negative sum of the terms above, at the optimum. None
    where a term is, or where the answer is no certified optimum (TiKMiX-M, fallback)."""

    active_constraints: list[str]
    """Those met with equality that this domain has a part in."""

    noise: float | None
    """Standard error of the sum of gain and uniformity, from the errors of the domain's own
    influence; at most so much, whatever the correlation between tasks."""

    change: Change | None
    """The answer's change of the weight as a sum of parts; None where one of them is."""

    total_variation: float | None
    total_variation_noise: float | None
    """How far the mixture moved, and what noise alone would move the answer."""

    note: str
    """What should be known before this is believed; empty if nothing."""

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


def explain(history: RunHistory, domain: str, stage: int | None = None) -> Explanation:
    """What pushed `domain` at the boundary before `stage` (None: the last that measured).

    Raises:
        InputError: an unknown domain or stage, or a boundary that solved nothing or came before
            the domain.
    """
    if domain not in history.domains:
        listed = ", ".join(map(clean, history.domains[:12]))
        raise InputError(f"no domain named {clean(domain)!r}; this run has {listed}")
    row, _ = measured(history, stage)
    solution = row.get("solution")
    if not solution or not solution.get("mixture"):
        raise InputError(f"stage {row['stage']}: nothing was solved there: {row.get('reason')}")
    # Of what was solved on: domains without a known influence count as 0, as they did there.
    domains = list(row["weights"])
    if domain not in domains:
        added = next(each["stage"] for each in history.stages if domain in each["weights"])
        raise InputError(
            f"stage {row['stage']}: domain {clean(domain)} was added later, with stage {added}; "
            f"ask of a stage that was measured after that"
        )
    matrix = Influence.of(row, domains)
    assert matrix is not None  # `measured` says so
    solved_D = np.array([solution["mixture"].get(name, 0.0) for name in domains])
    former = history.stages[history.stages.index(row) - 1]["weights"]
    objective = _objective(history, row, former, matrix)
    gain_VD, uniformity_D, diversity_D, price_V = _pushes(objective, solved_D)
    d = domains.index(domain)
    gain = {
        task: known(push) for task, push in zip(matrix.tasks, gain_VD[:, d].tolist(), strict=True)
    }
    terms = [*gain.values(), known(uniformity_D[d]), known(diversity_D[d])]
    certified = solution.get("certificate") is not None
    summed = [term for term in terms if term is not None]
    constraints = -sum(summed) if certified and len(summed) == len(terms) else None
    scale_V = np.abs(np.nan_to_num(matrix.values_VD)).max(axis=1)
    error_V = matrix.errors_VD[:, d] / np.where(scale_V > 0, scale_V, 1.0)
    noise = known(float(np.abs(price_V) @ error_V))
    log_reference_D = _log_reference(objective, len(domains))
    return Explanation(
        domain=domain,
        stage=row["stage"],
        iteration=row["start_iteration"],
        source=row.get("source"),
        reason=row.get("reason"),
        before=former.get(domain, 0.0),
        solved=float(solved_D[d]),
        after=row["weights"][domain],
        gain=gain,
        uniformity=known(uniformity_D[d]),
        diversity=known(diversity_D[d]),
        constraints=constraints,
        active_constraints=_active(history, solution, domain),
        noise=noise,
        change=decomposed(
            former.get(domain, 0.0),
            float(solved_D[d]),
            gain=gain,
            uniformity=known(uniformity_D[d]),
            constraints=constraints,
            noise=noise,
            reference=float(np.exp(log_reference_D[d])),
            divergence=_divergence(solved_D, log_reference_D),
            gamma=objective.gamma,
        ),
        total_variation=row.get("total_variation"),
        total_variation_noise=row.get("total_variation_noise"),
        note="; ".join(_notes(row, solution, known(uniformity_D[d]), known(diversity_D[d]))),
    )


def _pushes(objective: Objective, weights_D: Array) -> tuple[Array, Array, Array, Array]:
    """Gain (V, D), uniformity (D,) and diversity (D,), relative to their means over the mixture;
    and what a unit of each task's normalised influence is worth, (V,)."""
    gains_V = objective.rows_VD @ weights_D
    gain_V = objective.beta * objective.gain(gains_V)[1]
    std, std_V = objective.uniformity(gains_V)
    uniformity_V = -objective.alpha * std_V
    gain_VD = gain_V[:, None] * objective.rows_VD
    uniformity_D = uniformity_V @ objective.rows_VD
    if objective.alpha > 0 and len(gains_V) > 1 and std <= KINK * np.abs(gains_V).max():
        uniformity_D, uniformity_V = np.full_like(weights_D, np.nan), np.zeros_like(gains_V)
    diversity_D = objective.gamma * objective.diversity(weights_D)[1]
    return (
        gain_VD - (gain_VD @ weights_D)[:, None],
        uniformity_D - uniformity_D @ weights_D,
        diversity_D - np.nansum(diversity_D * weights_D) / weights_D[~np.isnan(diversity_D)].sum(),
        gain_V + uniformity_V,
    )


def _objective(
    history: RunHistory, row: Row, former: Mapping[str, float], matrix: Influence
) -> Objective:
    """The objective that was solved, from the configuration.

    Raises:
        InputError: config.yaml lacks a setting of it.
    """
    remix = history.setting("remix")
    needed = ("alpha", "beta", "gamma", "preset", "gain", "diversity_reference")
    missing = [name for name in needed if name not in (remix or {})]
    if missing:
        raise InputError(
            f"config.yaml of this run has no remix.{missing[0]}; the objective cannot be restated"
        )
    tasks = history.setting("tasks") or {}
    weights_V = np.array([(tasks.get(task) or {}).get("weight", 1.0) for task in matrix.tasks])
    paper = remix["preset"] == "paper"
    return Objective.of(
        np.nan_to_num(matrix.values_VD),
        alpha=remix["alpha"],
        beta=remix["beta"],
        gamma=remix["gamma"],
        task_weights_V=None if paper else weights_V,
        preset=remix["preset"],
        gain=remix["gain"] or ("linear" if paper else "log"),
        reference_D=_reference(history, row, former, remix["diversity_reference"] or "prior"),
    )


def _log_reference(objective: Objective, domains: int) -> Array:
    """ln of the mixture that diversity is measured from, (D,)."""
    if objective.log_reference_D is None:
        return np.full(domains, -np.log(domains))
    return objective.log_reference_D


def _divergence(weights_D: Array, log_reference_D: Array) -> float:
    """KL of the mixture to the reference."""
    held_D = weights_D > 0
    return float(weights_D[held_D] @ (np.log(weights_D[held_D]) - log_reference_D[held_D]))


def _reference(
    history: RunHistory, row: Row, former: Mapping[str, float], name: str
) -> Array | None:
    """The mixture that diversity is measured from, (D,) in the row's order; None: entropy."""
    if name == "uniform":
        return None
    if name == "prior":
        return Mixture({n: former.get(n, 0.0) for n in row["weights"]}).array(list(row["weights"]))
    last = history.stages[-1]
    samples, epochs = last.get("domain_samples") or {}, last.get("domain_epochs") or {}
    # Samples of one epoch; a domain that was never drawn has told nothing of its size.
    sizes_D = np.array(
        [samples[n] / epochs[n] if epochs.get(n) else np.nan for n in row["weights"]]
    )
    return sizes_D / np.nansum(sizes_D)


def _active(history: RunHistory, solution: Mapping[str, Any], domain: str) -> list[str]:
    """Active constraints on the domain itself, on a group of it, or on the mixture."""
    groups = history.setting("remix", "constraints", "groups") or {}
    mine = {name for name, group in groups.items() if domain in (group.get("domains") or [])}
    found = []
    for constraint in solution.get("active_constraints") or []:
        kind, _, name = constraint.partition(":")
        of_mixture = kind in ("total_variation", "pareto")
        if of_mixture or name == domain or (kind.startswith("group_") and name in mine):
            found.append(constraint)
    return found


def _notes(
    row: Row, solution: Mapping[str, Any], uniformity: float | None, diversity: float | None
) -> Iterator[str]:
    if solution.get("status") == "fallback":
        yield "the solver fell back to the nearest mixture that is allowed"
    elif solution.get("certificate") is None:
        yield (
            "TiKMiX-M chose by measured candidates; the terms are those of the influence it "
            "started from"
        )
    if row.get("source") == "kept":
        yield "the mixture was kept: the terms are those of the answer not followed"
    if uniformity is None:
        yield "all tasks gain alike there: uniformity and constraints push the rest, to 0"
    if diversity is None:
        yield "the domain was never drawn, so its share of the tokens is not in the run"
