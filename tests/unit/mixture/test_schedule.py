import json
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.blending import StageBlend
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule

some = settings(deadline=None, max_examples=60)


@st.composite
def schedules(draw):
    """A schedule of several stages, some of them with domains left out for a while."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    domains = [f"domain{d}" for d in range(draw(st.integers(1, 9)))]
    block_size = draw(
        st.sampled_from([1, 2, 5, 16])
        | st.builds(BatchSizes.ramp_up, st.just(2), st.just(3), st.integers(1, 60), st.just(8))
    )
    schedule = MixtureSchedule(domains, block_size, seed=draw(st.integers(0, 99)))
    done = start = 0
    for blocks in draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)):
        weights_D = rng.dirichlet(np.full(len(domains), 0.5)) * (rng.random(len(domains)) < 0.8)
        weights_D[rng.integers(len(domains))] += 0.1
        schedule.append(start, Mixture(dict(zip(domains, weights_D.tolist(), strict=True))))
        done += blocks
        start = int(schedule.blocks.samples_before(done))
    return schedule, start


@given(schedules())
@some
def test_every_domain_is_consumed_in_order_exactly_once_over_all_stages(case):
    schedule, end = case
    consumed = Counter()
    places = schedule.locate_many(np.arange(end + schedule.blocks.size))
    for index in range(end + schedule.blocks.size):
        assert schedule.domain_counts(index).tolist() == [
            consumed[d] for d in range(len(schedule.domains))
        ]
        place = schedule.locate(index)
        assert place.k == consumed[place.domain]
        assert place == tuple(column[index] for column in places)
        consumed[place.domain] += 1
        stage = schedule.stages[place.stage]
        assert stage.start_sample <= index
        assert stage.integer_weights_D[place.domain] > 0
        assert (
            place.stage == len(schedule.stages) - 1
            or index < schedule.stages[place.stage + 1].start_sample
        )


@given(schedules())
@some
def test_stages_follow_their_mixture_to_within_a_sample(case):
    schedule, end = case
    for stage in schedule.stages:
        until = [s.start_sample for s in schedule.stages[stage.index + 1 :]] + [end]
        samples = until[0] - stage.start_sample
        drawn_D = schedule.domain_counts(until[0]) - stage.start_counts_D
        wanted_D = samples * schedule.mixture(stage.index).array()
        assert abs(drawn_D - wanted_D).max() < 1


@given(schedules(), st.randoms())
@some
def test_resuming_anywhere_goes_on_where_the_run_was(case, random):
    schedule, end = case
    expected = [schedule.locate(index) for index in range(end)]
    stored = json.loads(json.dumps(schedule.to_json()))
    last = int(schedule.blocks.batch_of(schedule.stages[-1].start_sample))
    at = int(schedule.blocks.samples_before(last + random.randrange(9)))
    copies = (
        MixtureSchedule.from_json(stored),
        MixtureSchedule.from_json(stored, at, schedule.domain_counts(at).tolist()),
        pickle.loads(pickle.dumps(schedule)),
    )
    for copy in copies:
        assert copy.digest() == schedule.digest()
        for index in random.sample(range(end), min(end, 25)):
            assert copy.locate(index) == expected[index]
        shuffled = random.sample(range(end), end)
        places = zip(*(column.tolist() for column in copy.locate_many(shuffled)), strict=True)
        assert list(places) == [expected[index] for index in shuffled]
        assert copy.domain_counts(at + 40).tolist() == schedule.domain_counts(at + 40).tolist()


@given(schedules(), st.randoms())
@some
def test_an_added_domain_moves_no_sample(case, random):
    schedule, end = case
    names = list(schedule.domains)
    names.insert(random.randrange(len(names) + 1), "added")
    stored = json.loads(json.dumps(schedule.to_json()))
    at = schedule.stages[-1].start_sample
    wider = MixtureSchedule.from_json(stored, at, schedule.domain_counts(at).tolist(), names)
    for index in range(end):
        found, expected = wider.locate(index), schedule.locate(index)
        assert names[found.domain] == schedule.domains[expected.domain]
        assert (found.stage, found.k) == (expected.stage, expected.k)
    assert not wider.domain_counts(end)[names.index("added")]
    with pytest.raises(InputError, match="must stay, and in this order"):
        MixtureSchedule.from_json(stored, domains=["added", *schedule.domains[1:]])


def test_a_stage_without_a_sample_can_be_taken_back():
    schedule = MixtureSchedule(["a", "b"], 4, seed=1)
    schedule.append(0, Mixture({"a": 1.0, "b": 3.0}))
    digest = schedule.digest()
    schedule.append(8, Mixture({"a": 3.0, "b": 1.0}))
    assert not schedule.withdraw(9)
    assert schedule.withdraw(8)
    assert schedule.digest() == digest
    assert not schedule.withdraw(8)


@given(schedules(), st.integers(1, 5))
@some
def test_a_new_stage_changes_nothing_before_it(case, blocks):
    schedule, end = case
    # Served already, beyond the start of the stage to come: still nothing before it changes.
    expected = [schedule.locate(index) for index in range(end)]
    digest = schedule.digest()
    last = schedule.blocks.batch_of(schedule.stages[-1].start_sample)
    start = int(schedule.blocks.samples_before(last + blocks))
    counts_D = schedule.domain_counts(start)
    stage = schedule.append(start, Mixture.uniform(schedule.domains))
    assert stage.start_counts_D.tolist() == counts_D.tolist()
    until = min(start, end)
    assert [schedule.locate(index) for index in range(until)] == expected[:until]
    assert schedule.locate(start).stage == stage.index
    assert schedule.digest() != digest


def test_a_stage_starts_a_whole_number_of_blocks_after_the_last():
    schedule = MixtureSchedule(["a", "b"], block_size=8, seed=0)
    half = Mixture.uniform(["a", "b"])
    with pytest.raises(InputError, match="first stage must start at sample 0"):
        schedule.append(8, half)
    schedule.append(0, half)
    for start in (0, 4, 12, -8):
        with pytest.raises(InputError, match="whole number of blocks of 8"):
            schedule.append(start, half)
    schedule.append(16, half)
    with pytest.raises(InputError, match="whole number of blocks"):
        schedule.append(8, half)
    assert [stage.start_sample for stage in schedule.stages] == [0, 16]


def test_what_is_refused_leaves_the_schedule_as_it_was():
    schedule = MixtureSchedule(["a", "b"], block_size=8, seed=0)
    schedule.append(0, Mixture.uniform(["a", "b"]))
    digest = schedule.digest()
    for other in (Mixture.uniform(["a"]), Mixture.uniform(["a", "c"]), {"a": 1, "b": 1}):
        with pytest.raises(InputError):
            schedule.append(8, other)
    assert schedule.digest() == digest
    assert schedule.locate(100).stage == 0


def test_a_mixture_and_its_integer_weights_are_the_same_stage():
    mixture = Mixture({"a": 0.123, "b": 1, "c": 0})
    one, other = (MixtureSchedule("cab", block_size=8, seed=0) for _ in range(2))
    one.append(0, mixture)
    other.append(0, mixture.integer_weights())
    assert one.digest() == other.digest()
    assert one.mixture() == mixture.rounded()
    assert one.stages[0].integer_weights_D[0] == 0


def test_the_digest_tells_schedules_apart():
    def digest(domains=("a", "b"), block_size=8, seed=0, weight=1.0):
        schedule = MixtureSchedule(domains, block_size, seed)
        schedule.append(0, Mixture({"a": weight, "b": 1.0}))
        return schedule.digest()

    others = [digest(("b", "a")), digest(block_size=4), digest(seed=1), digest(weight=1 + 1e-8)]
    assert digest() == digest()
    assert len({digest(), *others}) == 5


def test_counts_that_do_not_follow_from_the_stages_are_refused():
    schedule = MixtureSchedule(["a", "b"], block_size=8, seed=0)
    schedule.append(0, Mixture({"a": 3, "b": 1}))
    schedule.append(16, Mixture({"a": 1, "b": 3}))
    stored = schedule.to_json()
    assert stored["stages"][1]["start_counts"] == [12, 4]
    stored["stages"][1]["start_counts"] = [11, 5]
    with pytest.raises(InputError, match="stage 1"):
        MixtureSchedule.from_json(stored)


def test_loading_a_long_run_makes_no_block_again(monkeypatch):
    schedule = MixtureSchedule(["a", "b", "c"], block_size=8, seed=0)
    schedule.append(0, Mixture({"a": 3, "b": 1, "c": 1e-4}))
    schedule.append(80_000, Mixture({"a": 1, "b": 3, "c": 1e-4}))
    stored, at = schedule.to_json(), 160_000
    expected, here = schedule.locate(at), schedule.domain_counts(at).tolist()
    steps = []
    for name in ("_one_more_block", "_pass_over"):
        step = getattr(StageBlend, name)
        monkeypatch.setattr(
            StageBlend, name, lambda *args, step=step: steps.append(1) or step(*args)
        )
    copy = MixtureSchedule.from_json(stored, at, here)
    assert copy.domain_counts(at).tolist() == here
    assert copy.locate(at) == expected
    assert len(steps) == 1
    with pytest.raises(InputError, match="do not follow its mixture"):
        MixtureSchedule.from_json(stored, at, [n + 9 for n in here])


def test_stages_cannot_be_changed():
    schedule = MixtureSchedule(["a", "b"], block_size=8, seed=0)
    stage = schedule.append(0, Mixture.uniform(["a", "b"]))
    with pytest.raises(ValueError, match="read-only"):
        stage.start_counts_D[0] = 5
    with pytest.raises(AttributeError):
        stage.start_sample = 8
    schedule.domain_counts(16)[:] = 99
    assert schedule.domain_counts(16).tolist() == [8, 8]


def test_no_domain_no_stage_and_no_negative_index():
    for domains in ([], ["a", "a"]):
        with pytest.raises(InputError, match="domains"):
            MixtureSchedule(domains, 8, 0)
    schedule = MixtureSchedule(["a"], 8, 0)
    with pytest.raises(IndexError):
        schedule.locate(0)
    schedule.append(0, Mixture({"a": 1}))
    with pytest.raises(IndexError):
        schedule.locate(-1)
