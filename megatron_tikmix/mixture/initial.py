"""Simple policies: mixtures that depend on nothing but the domains' sizes.

All are functions ``(domain_tokens, ...) -> Mixture``; :func:`propose_mixture` calls one by the name
that a configuration gives. `domain_tokens` are the tokens (or samples) of one epoch of each domain,
above 0, and give the order of the domains.
"""

import math
from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture

Policy = Literal["static", "uniform", "proportional", "temperature", "unimax"]
Option = TypeVar("Option")


def static(domain_tokens: Mapping[str, float], weights: Mapping[str, float]) -> Mixture:
    """Return the given weights, normalised.

    Raises:
        InputError: they do not name exactly the domains, or are no weights.
    """
    different = sorted(set(domain_tokens) ^ set(weights))
    if different:
        raise InputError(
            f"weights: they must name each domain of the corpus; different: {different[:5]}"
        )
    return Mixture({name: weights[name] for name in domain_tokens})


def uniform(domain_tokens: Mapping[str, float]) -> Mixture:
    """Return the same weight for every domain."""
    return Mixture.uniform(domain_tokens)


def proportional(domain_tokens: Mapping[str, float]) -> Mixture:
    """Return weights proportional to tokens: every domain makes the same number of epochs."""
    return temperature(domain_tokens, 1.0)


def temperature(domain_tokens: Mapping[str, float], temperature: float) -> Mixture:
    """Return w_j ∝ tokens_j^(1/T): proportional at T = 1, uniform in the limit of large T.

    This is the temperature of mT5 and XLM-R (exponent α = 1/T): a larger one favours small domains.

    Raises:
        InputError: T or a domain's tokens are not above 0.
    """
    _check_tokens(domain_tokens)
    if not temperature > 0:  # also false for NaN
        raise InputError(f"temperature is {temperature}; it must be above 0")
    logs = {name: math.log(tokens) for name, tokens in domain_tokens.items()}
    largest = max(logs.values())
    return Mixture({name: math.exp((log - largest) / temperature) for name, log in logs.items()})


def unimax(
    domain_tokens: Mapping[str, float], budget_tokens: float, max_epochs: float = 4.0
) -> Mixture:
    """Return the most uniform mixture with at most `max_epochs` passes over each domain.

    Source: Chung et al., *UniMax* (arXiv 2304.09151), algorithm 1. From the smallest domain to
    the largest, each gets an equal share of the budget that is left, or `max_epochs` passes if
    that is less.

    Args:
        budget_tokens: total to be drawn from all domains, in the unit of `domain_tokens`.

    Raises:
        InputError: a number is not positive, or the budget exceeds `max_epochs` passes over all
            domains. (The paper's algorithm then exceeds `max_epochs`.)
    """
    _check_tokens(domain_tokens)
    if not 0 < budget_tokens < math.inf or not max_epochs > 0:
        raise InputError(
            f"budget_tokens and max_epochs are {budget_tokens} and {max_epochs}; both must be "
            "above 0"
        )
    most = max_epochs * math.fsum(domain_tokens.values())
    if budget_tokens > most * (1 + 1e-12):
        raise InputError(
            f"budget_tokens is {budget_tokens:.6g}, and {max_epochs:g} epochs of all domains are "
            f"{most:.6g}; raise max_epochs, lower the budget, or add data"
        )
    left, shares = float(budget_tokens), {}
    ascending = sorted(domain_tokens, key=lambda name: (domain_tokens[name], name))
    for rank, name in enumerate(ascending):
        shares[name] = min(left / (len(ascending) - rank), max_epochs * domain_tokens[name])
        left -= shares[name]
    return Mixture({name: shares[name] / budget_tokens for name in domain_tokens})


def propose_mixture(
    policy: Policy,
    domain_tokens: Mapping[str, float],
    *,
    weights: Mapping[str, float] | None = None,
    temperature: float | None = None,
    budget_tokens: float | None = None,
    max_epochs: float = 4.0,
) -> Mixture:
    """Return the mixture of a policy, given by name. Options of other policies are ignored.

    Args:
        weights: for `static`.
        temperature: for `temperature`.
        budget_tokens, max_epochs: for `unimax`.

    Raises:
        InputError: the policy is unknown or lacks an option, or as for the policy.
    """
    match policy:
        case "static":
            return static(domain_tokens, _needed("weights", weights, policy))
        case "uniform":
            return uniform(domain_tokens)
        case "proportional":
            return proportional(domain_tokens)
        case "temperature":
            return _temperature(domain_tokens, _needed("temperature", temperature, policy))
        case "unimax":
            budget = _needed("budget_tokens", budget_tokens, policy)
            return unimax(domain_tokens, budget, max_epochs)
    raise InputError(f"policy is {policy!r}; it must be one of {', '.join(get_args(Policy))}")


_temperature = temperature  # for use where an argument has the same name


def _needed(name: str, value: Option | None, policy: str) -> Option:
    if value is None:
        raise InputError(f"{name}: the policy {policy} needs it")
    return value


def _check_tokens(domain_tokens: Mapping[str, float]) -> None:
    if not domain_tokens:
        raise InputError("domain_tokens: no domain is named; give at least one and its tokens")
    for name, tokens in domain_tokens.items():
        if not 0 < tokens < math.inf:
            raise InputError(
                f"domain_tokens: domain {name} has {tokens} tokens; leave it out, or give it data"
            )
