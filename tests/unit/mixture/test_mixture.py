import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL, Mixture

weights = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.floats(0, 1e300) | st.just(0.0) | st.integers(0, 10**12),
    min_size=1,
    max_size=30,
).filter(lambda given: sum(given.values()) > 0)
any_weights = settings(deadline=None, max_examples=200)


def test_it_normalises_and_keeps_zero_weights():
    mixture = Mixture({"code": 3, "prose": 1, "noise": 0})
    assert dict(mixture) == {"code": 0.75, "prose": 0.25, "noise": 0.0}
    assert mixture.array(["noise", "prose", "code"]).tolist() == [0.0, 0.25, 0.75]
    assert Mixture.proportional({"code": 300, "prose": 100, "noise": 0}) == mixture
    assert dict(Mixture.uniform(["a", "b", "c", "d"])) == dict.fromkeys("abcd", 0.25)


def test_equality_and_hash_ignore_the_order_of_names():
    one, other = Mixture({"a": 1, "b": 3}), Mixture({"b": 0.75, "a": 0.25})
    assert one == other
    assert len({one, other}) == 1
    assert one != Mixture({"a": 1, "b": 3.0001})


def test_it_cannot_be_changed():
    with pytest.raises(TypeError):
        Mixture({"a": 1})["a"] = 2.0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "no domain"),
        ({"a": -0.1, "b": 1}, "domain a"),
        ({"a": 1, "b": math.nan}, "domain b"),
        ({"a": math.inf}, "domain a"),
        ({"a": "0.5"}, "domain a"),
        ({"a": None}, "domain a"),
        ({1: 1.0}, "name 1"),
        ({"a": 0, "b": 0.0}, "sum to 0"),
        ({"a": 1e308, "b": 1e308}, "sum to inf"),
    ],
)
def test_it_refuses_in_one_sentence(given, named):
    with pytest.raises(InputError, match=named) as refusal:
        Mixture(given)
    assert "\n" not in str(refusal.value)


def test_array_refuses_other_domains():
    for domains in (["a"], ["a", "b", "c"], ["a", "a"]):
        with pytest.raises(InputError):
            Mixture({"a": 1, "b": 1}).array(domains)


@given(weights)
@any_weights
def test_integer_weights_are_the_nearest_that_sum_to_the_total(given):
    mixture = Mixture(given)
    integers = mixture.integer_weights()
    assert sum(integers.values()) == WEIGHT_TOTAL
    remainders = {True: [0.0], False: [0.0]}
    for name, weight in mixture.items():
        rounded_up = integers[name] - math.floor(weight * WEIGHT_TOTAL)
        assert rounded_up in (0, 1)
        assert integers[name] == 0 or weight > 0
        remainders[bool(rounded_up)].append(weight * WEIGHT_TOTAL % 1)
    assert min(remainders[True][1:], default=1.0) >= max(remainders[False])


@given(weights, st.randoms())
@any_weights
def test_integer_weights_do_not_depend_on_the_order_of_names(given, random):
    names = list(given)
    random.shuffle(names)
    shuffled = Mixture({name: given[name] for name in names})
    assert shuffled.integer_weights() == Mixture(given).integer_weights()


def test_ties_go_to_the_first_names():
    integers = Mixture.uniform(["c", "b", "a"]).integer_weights()
    assert WEIGHT_TOTAL % 3 == 1
    assert integers == {"a": WEIGHT_TOTAL // 3 + 1, "b": WEIGHT_TOTAL // 3, "c": WEIGHT_TOTAL // 3}


@given(weights)
@any_weights
def test_json_gives_back_the_same_bits(given):
    mixture = Mixture(given)
    assert Mixture.from_json(json.loads(json.dumps(mixture.to_json()))) == mixture
    rounded = mixture.rounded()
    again = Mixture.from_json(json.loads(json.dumps(rounded.to_json())))
    assert again == rounded == rounded.rounded()
    assert again.integer_weights() == mixture.integer_weights()


@pytest.mark.parametrize(
    "given",
    [
        {"a": WEIGHT_TOTAL - 1},
        {"a": WEIGHT_TOTAL + 1, "b": -1},
        {"a": WEIGHT_TOTAL * 0.5, "b": WEIGHT_TOTAL * 0.5},
    ],
)
def test_integer_weights_that_are_none_are_refused(given):
    with pytest.raises(InputError):
        Mixture.from_integer_weights(given)


def test_distance_and_effective_domains_by_hand():
    one, other = Mixture({"a": 0.5, "b": 0.5, "c": 0}), Mixture({"c": 0.4, "a": 0.3, "b": 0.3})
    assert one.total_variation(other) == pytest.approx(0.4)
    assert Mixture({"a": 1, "b": 0}).total_variation(Mixture({"a": 0, "b": 1})) == 1.0
    assert Mixture.uniform([str(n) for n in range(7)]).effective_domains == pytest.approx(7)
    assert Mixture({"a": 1, "b": 0}).effective_domains == 1.0
    quarter = np.array([0.25, 0.75])
    expected = np.prod(quarter**-quarter)
    assert Mixture({"a": 1, "b": 3}).effective_domains == pytest.approx(expected)


def test_it_prints_the_largest_first():
    assert repr(Mixture({"a": 1, "b": 3})) == "Mixture(b: 0.75, a: 0.25)"
    assert "and 88 smaller" in repr(Mixture.uniform([str(n) for n in range(100)]))
