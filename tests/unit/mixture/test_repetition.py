"""Epochs that a settled mixture will take: against counting the schedule's samples one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.repetition import first_shortage, planned_samples
from megatron_tikmix.mixture.schedule import MixtureSchedule


@st.composite
def schedules(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    names = [f"d{d}" for d in range(draw(st.integers(1, 5)))]
    schedule = MixtureSchedule(names, 4, 0)
    start = 0
    for blocks in draw(st.lists(st.integers(1, 30), min_size=1, max_size=4)):
        weights_D = rng.dirichlet(np.ones(len(names)))
        schedule.append(start, Mixture(dict(zip(names, weights_D.tolist(), strict=True))))
        start += 4 * blocks
    return schedule, start, rng


@given(schedules())
@settings(max_examples=60)
def test_the_first_domain_to_run_dry(case):
    schedule, end, rng = case
    stages = len(schedule.stages)
    names = schedule.domains
    assert np.abs(planned_samples(schedule, end) - schedule.domain_counts(end)).max() <= stages
    per_epoch = {name: int(rng.integers(2, 30)) for name in names}
    caps = {name: float(rng.uniform(0.5, 6)) for name in names}
    short = first_shortage(schedule, end, per_epoch, caps)
    may_D = np.array([caps[name] * per_epoch[name] for name in names])
    counts_ND = np.array([schedule.domain_counts(n) for n in range(end + 1)])
    over_D = counts_ND[-1] - may_D
    if short is None:
        assert (over_D <= 2 * stages).all()
        return
    d = names.index(short.domain)
    assert over_D[d] > 0
    # At that sample the domain has given all it may, to the samples by which counts are rounded
    # and those that a block's order moves.
    assert abs(counts_ND[short.sample, d] - may_D[d]) <= stages + 4
    assert (counts_ND[short.sample] <= may_D + stages + 4).all(), "no other was dry earlier"
    planned = planned_samples(schedule, end)[d]
    assert short.epochs * per_epoch[short.domain] == pytest.approx(planned)


def test_with_the_largest_weight_it_lasts():
    schedule = MixtureSchedule(["a", "b"], 10, 0)
    schedule.append(0, Mixture({"a": 0.5, "b": 0.5}))
    sizes = {"a": 100, "b": 10_000}
    short = first_shortage(schedule, 1000, sizes, 2.0)
    assert short is not None
    assert (short.domain, short.sample, short.epochs) == ("a", 400, 5.0)
    lower = MixtureSchedule(["a", "b"], 10, 0)
    lower.append(0, Mixture({"a": short.largest_weight, "b": 1 - short.largest_weight}))
    assert first_shortage(lower, 1000, sizes, 2.0) is None
    assert first_shortage(schedule, 1000, sizes, {"b": 2.0}) is None
    assert first_shortage(schedule, 1000, sizes, {"a": 5.0}) is None
