"""Policies that train runs to choose a static mixture: the best static one, RegMix, DoReMi."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightgbm
import numpy as np
import yaml
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, least_squares, minimize

from claims.profile import Profile
from claims.runs import Experiment, Result, Runner

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """A static mixture, and what it cost to choose it."""

    weights: dict[str, float]
    flops: float
    seconds: float
    note: str = ""


def static(weights: dict[str, float]) -> dict[str, Any]:
    """Settings of a run that keeps these weights."""
    return {"data.initial_mixture": weights}


def mean_loss(result: Result, tasks: Sequence[str]) -> float:
    """Over the tasks, at the end of the run."""
    return float(np.mean([result["task_loss"][task] for task in tasks]))


def designed(profile: Profile, domains: Sequence[str]) -> list[dict[str, float]]:
    """Mixtures drawn before anything is trained, from a seed alone.

    A third from a flat Dirichlet distribution, a third from a sparse one, a third from one that
    gives the junk domains little: mixtures good, bad, and in between.
    """
    generator = np.random.default_rng(profile.search_seed)
    junk_D = np.array([name in profile.junk for name in domains])
    shapes = [np.full(len(domains), 1.0), np.full(len(domains), 0.3), np.where(junk_D, 0.1, 1.0)]
    drawn = [generator.dirichlet(shapes[n % 3]) for n in range(profile.whole_runs)]
    return [dict(zip(domains, weights_D.tolist(), strict=True)) for weights_D in drawn]


def whole_runs(
    runner: Runner, domains: Sequence[str]
) -> tuple[list[dict[str, float]], list[Result]]:
    """The designed mixtures, and a whole run on each."""
    profile = runner.profile
    mixtures = designed(profile, domains)
    return mixtures, runner(
        [
            Experiment(policy=f"designed {n}", seed=profile.search_seed, settings=static(mixture))
            for n, mixture in enumerate(mixtures)
        ]
    )


# The best static mixture --------------------------------------------------------------------


def best_static(runner: Runner, domains: Sequence[str], say: Callable[[str], None]) -> Choice:
    """The best static mixture found, by whole runs at the search seed.

    A start from the designed mixtures, uniform over all, over all but junk, and over the domains
    that are tasks. Then rounds: fit :class:`EffectiveTokens` to all runs so far, and run its
    optimum and mixtures around it. Of the last optimum, the best mixture that was run and the one
    uniform over the tasks' domains, the best on two further seeds.
    """
    profile, tasks = runner.profile, runner.profile.tasks
    mixtures, results = whole_runs(runner, domains)
    held_out = {task.get("domain") for name, task in profile.run["tasks"].items() if name in tasks}
    plain = [
        dict.fromkeys(domains, 1.0),
        {name: float(name not in profile.junk) for name in domains},
        {name: float(name in held_out) for name in domains},
    ]
    mixtures = mixtures + [_normalised(weights) for weights in plain]
    results = results + _run(runner, mixtures[len(results) :], "search 0", profile.search_seed)
    generator = np.random.default_rng(profile.search_seed + 1)
    for turn in range(profile.search_rounds):
        best_D = EffectiveTokens.fitted(mixtures, results, domains, tasks).optimum()
        around = generator.dirichlet(60 * best_D + 0.05, size=profile.search_runs - 1)
        tried = [
            dict(zip(domains, weights_D.tolist(), strict=True)) for weights_D in [best_D, *around]
        ]
        results = results + _run(runner, tried, f"search {turn + 1}", profile.search_seed)
        mixtures = mixtures + tried
        say(f"best static mixture, round {turn + 1}: {min(_losses(results, tasks)):.4f}")
    last_D = EffectiveTokens.fitted(mixtures, results, domains, tasks).optimum()
    finalists = [
        dict(zip(domains, last_D.tolist(), strict=True)),
        mixtures[int(np.argmin(_losses(results, tasks)))],
        _normalised(plain[2]),
    ]
    scores = []
    for finalist in finalists:
        again = [
            _run(runner, [finalist], "finalist", seed)[0]
            for seed in (profile.search_seed + 1, profile.search_seed + 2)
        ]
        results = results + again
        scores.append(np.mean(_losses(again, tasks)))
    return Choice(
        finalists[int(np.argmin(scores))],
        flops=sum(result["flops"] for result in results),
        seconds=sum(result["seconds"] for result in results),
        note=f"{len(results)} whole runs",
    )


def _run(
    runner: Runner, mixtures: Sequence[dict[str, float]], name: str, seed: int
) -> list[Result]:
    return runner(
        [Experiment(policy=name, seed=seed, settings=static(weights)) for weights in mixtures]
    )


def _losses(results: Sequence[Result], tasks: Sequence[str]) -> list[float]:
    return [mean_loss(result, tasks) for result in results]


def _normalised(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


@dataclass(frozen=True)
class EffectiveTokens:
    """loss_i(w) = c_i − s_i ln(ε + Σ_j t_ij w_j), 0 ≤ t ≤ 1: convex in w, few numbers to fit.

    A token of domain j counts as t_ij tokens of what task i needs; the loss falls with their
    logarithm.
    """

    transfer_VD: Array
    slope_V: Array
    floor: float = 0.02

    @classmethod
    def fitted(
        cls,
        mixtures: Sequence[dict[str, float]],
        results: Sequence[Result],
        domains: Sequence[str],
        tasks: Sequence[str],
    ) -> "EffectiveTokens":
        """Least squares, a task at a time, with a small price on t."""
        weights_ND = np.array([[mixture[name] for name in domains] for mixture in mixtures])
        fits = []
        for task in tasks:
            loss_N = np.array([result["task_loss"][task] for result in results])
            fits.append(cls._fit(weights_ND, loss_N))
        return cls(np.array([fit[2:] for fit in fits]), np.array([fit[1] for fit in fits]))

    @classmethod
    def _fit(cls, weights_ND: Array, loss_N: Array) -> Array:
        D = weights_ND.shape[1]

        def residuals(x: Array) -> Array:
            predicted_N = x[0] - x[1] * np.log(cls.floor + weights_ND @ x[2:])
            return np.concatenate([predicted_N - loss_N, 0.01 * x[2:]])

        correlation_D = [np.corrcoef(weights_ND[:, j], -loss_N)[0, 1] for j in range(D)]
        start = np.concatenate([[loss_N.mean(), 0.1], np.clip(correlation_D, 0.05, 0.9)])
        low, high = np.zeros(D + 2), np.ones(D + 2)
        low[0], high[0], high[1] = -np.inf, np.inf, np.inf
        found: Array = least_squares(residuals, start, bounds=(low, high)).x
        return found

    def optimum(self) -> Array:
        """The mixture of least mean loss, (D,)."""
        D = self.transfer_VD.shape[1]

        def value_and_gradient(w: Array) -> tuple[float, Array]:
            effective_V = self.floor + self.transfer_VD @ w
            slope_D = -(self.slope_V / effective_V) @ self.transfer_VD
            return float(-self.slope_V @ np.log(effective_V)), slope_D

        found = minimize(
            value_and_gradient,
            np.full(D, 1 / D),
            jac=True,
            method="SLSQP",
            bounds=Bounds(0.0, 1.0),
            constraints=LinearConstraint(np.ones((1, D)), 1.0, 1.0),
            options={"ftol": 1e-10, "maxiter": 500},
        ).x.clip(min=0)
        answer: Array = found / found.sum()
        return answer


# RegMix -------------------------------------------------------------------------------------


def regmix(runner: Runner, domains: Sequence[str], proxies: int) -> Choice:
    """RegMix (Liu et al. 2024, arXiv 2407.01492) with so many proxy runs.

    Proxies are short runs of the same model on mixtures drawn around the token proportions; a
    LightGBM regression of the mean task loss; and of 100,000 mixtures drawn, the mean of the best
    100 by it.
    """
    profile, tasks = runner.profile, runner.profile.tasks
    manifest = yaml.safe_load(runner.manifest.read_text(encoding="utf-8"))
    tokens_D = np.array([manifest["domains"][name]["train"]["tokens"] for name in domains], float)
    generator = np.random.default_rng(profile.search_seed + 2)

    def draw(count: int) -> Array:
        # Concentrations from 0.1 to 5 around the proportions, as the authors draw them.
        scale_N1 = np.exp(generator.uniform(np.log(0.1), np.log(5.0), size=(count, 1)))
        shape_ND = scale_N1 * tokens_D / tokens_D.mean()
        gamma_ND = generator.standard_gamma(np.maximum(shape_ND, 1e-3)) + 1e-12
        drawn: Array = gamma_ND / gamma_ND.sum(axis=1, keepdims=True)
        return drawn

    weights_ND = draw(max(profile.proxies))[:proxies]  # the first ones are the same at any quality
    short = {
        "train.train_iters": profile.proxy_iters,
        "remix.interval_samples": None,
        "remix.first_interval_samples": None,
    }
    results = runner(
        [
            Experiment(
                policy="RegMix proxy",
                seed=profile.search_seed,
                settings=static(dict(zip(domains, weights_D.tolist(), strict=True))) | short,
            )
            for weights_D in weights_ND
        ]
    )
    loss_N = np.array(_losses(results, tasks))
    options = {
        "learning_rate": 0.05,
        "num_leaves": 15,
        "min_data_in_leaf": max(2, proxies // 12),
        "verbosity": -1,
        "seed": 0,
        "num_threads": 1,
    }
    trained = lightgbm.Dataset(weights_ND, loss_N, params=options)
    model = lightgbm.train(options, trained, num_boost_round=200)
    candidates_ND = draw(100_000)
    best = np.argsort(np.asarray(model.predict(candidates_ND)))[:100]
    chosen_D = candidates_ND[best].mean(axis=0)
    return Choice(
        dict(zip(domains, chosen_D.tolist(), strict=True)),
        flops=sum(result["flops"] for result in results),
        seconds=sum(result["seconds"] for result in results),
        note=f"{proxies} proxies of {profile.proxy_iters} iterations",
    )


# DoReMi -------------------------------------------------------------------------------------


def doremi(runner: Runner, domains: Sequence[str]) -> Choice:
    """A reference run on the token proportions, then a proxy run against it."""
    profile = runner.profile
    # The reference's loss on every domain, held out: tasks that nothing is decided on.
    tasks = {f"held_out_{name}": {"domain": name, "decides": False} for name in domains}
    reference = runner(
        [
            Experiment(
                policy="DoReMi reference",
                seed=profile.search_seed,
                settings={"data.initial_mixture": "proportional", "tasks": tasks},
            )
        ]
    )[0]
    losses = {name: reference["task_loss"][f"held_out_{name}"] for name in domains}
    options = {"every": profile.online_iters, "reference": losses}
    proxy = runner(
        [Experiment(policy="DoReMi proxy", seed=profile.search_seed, online=("doremi", options))]
    )[0]
    return Choice(
        proxy["mean_mixture"],
        flops=reference["flops"] + proxy["flops"],
        seconds=reference["seconds"] + proxy["seconds"],
        note="two whole runs",
    )
