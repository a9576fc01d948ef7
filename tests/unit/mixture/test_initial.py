import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.initial import propose_mixture, temperature, unimax
from megatron_tikmix.mixture.mixture import Mixture

TOKENS = {"small": 10, "middle": 100, "large": 1000}

corpora = st.lists(st.integers(1, 10**9), min_size=1, max_size=12).map(
    lambda tokens: {f"domain{d}": n for d, n in enumerate(tokens)}
)


def test_closed_forms():
    assert propose_mixture("uniform", TOKENS) == Mixture.uniform(TOKENS)
    assert propose_mixture("proportional", TOKENS)["large"] == pytest.approx(1000 / 1110)
    weights = {"large": 1, "small": 3, "middle": 0}
    chosen = propose_mixture("static", TOKENS, weights=weights)
    assert dict(chosen) == {"small": 0.75, "middle": 0.0, "large": 0.25}
    # T = 2: square roots.
    roots = {name: math.sqrt(n) for name, n in TOKENS.items()}
    for name, weight in propose_mixture("temperature", TOKENS, temperature=2).items():
        assert weight == pytest.approx(roots[name] / sum(roots.values()))
    # 300 tokens, 4 epochs: 40 of the small domain, and half of what is left of each other one.
    assert propose_mixture("unimax", TOKENS, budget_tokens=300) == Mixture(
        {"small": 40, "middle": 130, "large": 130}
    )
    assert list(propose_mixture("unimax", TOKENS, budget_tokens=300)) == list(TOKENS)


@settings(deadline=None, max_examples=50)
@given(corpora, st.floats(0.01, 1e6))
def test_temperature_leads_from_the_largest_through_proportional_to_uniform(tokens, T):
    mixture = temperature(tokens, T)
    assert temperature(tokens, 1.0).total_variation(Mixture(tokens)) < 1e-12
    assert temperature(tokens, math.inf) == Mixture.uniform(tokens)
    largest = max(tokens, key=tokens.__getitem__)
    for name, weight in mixture.items():
        ratio = (tokens[name] / tokens[largest]) ** (1 / T)
        assert weight / mixture[largest] == pytest.approx(ratio, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(corpora, st.floats(0.001, 1), st.floats(0.1, 10))
def test_unimax_is_as_uniform_as_the_epochs_allow(tokens, share, max_epochs):
    budget = share * max_epochs * sum(tokens.values())
    weights_D = unimax(tokens, budget, max_epochs).array()
    caps_D = max_epochs * np.array(list(tokens.values())) / budget
    assert (weights_D <= caps_D * (1 + 1e-9)).all()
    # The largest weight is the least possible: a linear program in (w, level).
    D = len(weights_D)
    least = linprog(
        np.append(np.zeros(D), 1.0),
        A_ub=np.hstack([np.eye(D), -np.ones((D, 1))]),
        b_ub=np.zeros(D),
        A_eq=np.append(np.ones(D), 0.0)[None],
        b_eq=[1.0],
        bounds=[*((0, min(cap * (1 + 1e-9), 1.0)) for cap in caps_D), (0, 1)],
    )
    assert weights_D.max() == pytest.approx(least.fun, abs=1e-6)
    # And whoever has less than the largest is at its cap.
    short = weights_D < weights_D.max() * (1 - 1e-9)
    np.testing.assert_allclose(weights_D[short], caps_D[short], rtol=1e-6)


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("best", {}, "policy is 'best'; it must be one of static, uniform"),
        ("static", {}, "weights: the policy static needs it"),
        ("static", {"weights": {"small": 1}}, "different: .'large', 'middle'."),
        ("temperature", {}, "temperature: the policy temperature needs it"),
        ("temperature", {"temperature": 0}, "temperature is 0"),
        ("temperature", {"temperature": math.nan}, "temperature is nan"),
        ("unimax", {}, "budget_tokens: the policy unimax needs it"),
        ("unimax", {"budget_tokens": 5000}, "4 epochs of all domains are 4440"),
        ("unimax", {"budget_tokens": -1}, "both must be above 0"),
    ],
)
def test_bad_options_are_told_in_a_sentence(policy, options, message):
    with pytest.raises(InputError, match=message):
        propose_mixture(policy, TOKENS, **options)


@pytest.mark.parametrize("policy", ["proportional", "temperature", "unimax"])
def test_a_domain_without_tokens_is_refused(policy):
    with pytest.raises(InputError, match="domain empty has 0 tokens"):
        propose_mixture(policy, {"empty": 0, "full": 1}, temperature=2, budget_tokens=1)
    with pytest.raises(InputError, match="no domain is named"):
        propose_mixture(policy, {}, temperature=2, budget_tokens=1)
