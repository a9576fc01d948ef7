"""Every policy that is compared: what it trains, and what its decision cost before the run."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from claims import searches
from claims.runs import Experiment, Result, Runner
from claims.searches import Choice, static
from megatron_tikmix.mixture.initial import propose_mixture
from megatron_tikmix.mixture.mixture import Mixture

PAPER = {"remix.policy": "tikmix_d", "remix.preset": "paper"}
DEFAULT = {"remix.policy": "tikmix_d"}


@dataclass(frozen=True)
class Policy:
    """A line of the comparison.

    Attributes:
        name: in the tables.
        settings, online: of its runs, as in :class:`~claims.runs.Experiment`.
        choice: what chose its mixture before the run, with the cost; None if nothing did.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    online: tuple[str, Mapping[str, Any]] | None = None
    choice: Choice | None = None


@dataclass(frozen=True)
class Outcome:
    """A policy, and its runs in the order of the profile's seeds."""

    policy: Policy
    runs: list[Result]


def chosen(policy: str, choice: Choice) -> Policy:
    return Policy(policy, static(choice.weights), choice=choice)


def heuristics(runner: Runner) -> list[Policy]:
    """Policies that look at sizes alone."""
    profile = runner.profile
    manifest = yaml.safe_load(runner.manifest.read_text(encoding="utf-8"))
    tokens = {name: domain["train"]["tokens"] for name, domain in manifest["domains"].items()}
    run = profile.run
    budget = profile.iters * run["train"]["global_batch_size"] * run["data"]["sequence_length"]

    def fixed(name: str, mixture: Mixture) -> Policy:
        # Rounded, so that two ways to the same weights are one run.
        return Policy(name, static({key: round(weight, 12) for key, weight in mixture.items()}))

    junk = {name: float(name not in profile.junk) for name in tokens}
    return [
        fixed("uniform", propose_mixture("uniform", tokens)),
        fixed("uniform, no junk", Mixture(junk)),
        fixed("proportional", propose_mixture("proportional", tokens)),
        fixed("temperature 2", propose_mixture("temperature", tokens, temperature=2.0)),
        fixed("UniMax, 4 epochs", propose_mixture("unimax", tokens, budget_tokens=budget)),
    ]


def domains(runner: Runner) -> list[str]:
    """Names of the corpus' domains."""
    return list(yaml.safe_load(runner.manifest.read_text(encoding="utf-8"))["domains"])


def all_policies(runner: Runner, say: Callable[[str], None]) -> list[Policy]:
    """Every line of the comparison; trains what some of them need to choose a mixture."""
    profile, names = runner.profile, domains(runner)

    def wanted(name: str) -> bool:
        return profile.only is None or name in profile.only

    policies = heuristics(runner)
    say("the best static mixture: whole runs")
    policies.append(chosen("best static", searches.best_static(runner, names, say)))
    for proxies in profile.proxies:
        if wanted(f"RegMix, {proxies}"):
            say(f"RegMix with {proxies} proxies")
            policies.append(chosen(f"RegMix, {proxies}", searches.regmix(runner, names, proxies)))
    if wanted("DoReMi-style"):
        say("DoReMi: reference and proxy")
        policies.append(chosen("DoReMi-style", searches.doremi(runner, names)))
    policies.append(Policy("ODM", online=("odm", {"every": profile.online_iters})))
    return [policy for policy in policies + tikmix(runner) if wanted(policy.name)]


def tikmix(runner: Runner) -> list[Policy]:
    profile = runner.profile
    remix = profile.run["remix"]
    first = remix.get("first_interval_samples") or remix["interval_samples"]
    once = {**DEFAULT, "remix.stop": int(first) // int(profile.run["train"]["global_batch_size"])}
    by_rollouts = {
        **DEFAULT,
        "remix.policy": "tikmix_m",
        "remix.measure": "rollout",
        **profile.rollout,
    }
    return [
        Policy("TiKMiX-D, paper", PAPER),
        Policy("TiKMiX-D", DEFAULT),
        Policy("TiKMiX-D, once", once),
        Policy("TiKMiX-M, rollouts", by_rollouts),
    ]


def run_policies(runner: Runner, policies: Sequence[Policy], seeds: Sequence[int]) -> list[Outcome]:
    """Each policy with each seed, all of a seed one after the other."""
    experiments = [
        Experiment(policy=p.name, seed=seed, settings=p.settings, online=p.online)
        for seed in seeds
        for p in policies
    ]
    results = runner(experiments)
    return [
        Outcome(policy, results[number :: len(policies)]) for number, policy in enumerate(policies)
    ]


# Ablations ----------------------------------------------------------------------------------


def ablations(runner: Runner) -> dict[str, list[Policy]]:
    """What is changed in the default of TiKMiX-D, one thing at a time, by table."""
    remix, probe = runner.profile.run["remix"], runner.profile.run["probe"]
    interval = int(remix["interval_samples"])
    optimizer, train = runner.profile.run["optimizer"], runner.profile.run["train"]
    settled = math.ceil(3 / (1 - optimizer["adam_beta2"])) * train["global_batch_size"]

    def changed(name: str, **settings: Any) -> Policy:
        fields = {key.replace("__", "."): value for key, value in settings.items()}
        return Policy(name, {**DEFAULT, **fields})

    return {
        "influence": [
            changed("marginal", remix__influence="marginal"),
            # Adam's second moment has to settle first.
            changed(
                "adam, first boundary later",
                probe__curvature="adam",
                remix__first_interval_samples=settled,
            ),
            changed("first boundary later", remix__first_interval_samples=settled),
        ],
        "probe tokens": [
            changed("domains: twice", probe__sub_batches=2 * probe["sub_batches"]),
            changed("tasks: twice", probe__task_samples=2 * probe["task_samples"]),
        ],
        "interval": [
            changed("half as long", remix__interval_samples=interval // 2),
            changed("twice as long", remix__interval_samples=2 * interval),
        ],
        "objective": [
            changed("linear gain", remix__gain="linear"),
            changed("α = 0", remix__alpha=0.0),
            changed("γ = 0.5", remix__gamma=0.5),
            changed("γ = 2", remix__gamma=2.0),
            changed("entropy", remix__diversity_reference="uniform"),
            changed(
                "marginal, linear, entropy (V-scaled)",
                remix__influence="marginal",
                remix__gain="linear",
                remix__diversity_reference="uniform",
            ),
        ],
        "limits and noise": [
            changed("total variation 0.25", remix__constraints__max_total_variation=0.25),
            changed("Pareto", remix__constraints__pareto=True),
            changed(
                "Pareto at 95 %",
                remix__constraints__pareto=True,
                remix__constraints__confidence=0.95,
            ),
            changed("no smoothing", remix__smoothing=0.0),
            changed("smoothing 0.8", remix__smoothing=0.8),
        ],
    }
