import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.blending import StageBlend
from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL, Mixture

some = settings(deadline=None, max_examples=60)


def integer_weights(weights):
    names = [f"{d:05}" for d in range(len(weights))]
    integers = Mixture(dict(zip(names, weights, strict=True))).integer_weights()
    return np.array([integers[name] for name in names], dtype=np.int64)


@st.composite
def blends(draw):
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    domains, evenness = draw(st.integers(1, 40)), draw(st.sampled_from([0.05, 0.3, 1.0, 10.0]))
    weights_D = rng.dirichlet(np.full(domains, evenness))
    weights_D[rng.random(domains) < 0.1] = 0
    weights_D[0] += 1e-6
    return integer_weights(weights_D), draw(st.sampled_from([1, 2, 3, 8, 64])), seed


# Serving the largest deficits first needs 16 places in block 7 of this one, and there are 15.
STUMBLE = [32162437, 34868410, 31771890, 564092767, 204606031, 206240289]


@given(blends())
@example((np.array(STUMBLE), 3, 0))
@some
def test_every_block_prefix_is_within_one_sample_of_the_mixture(blend):
    weights_D, block_size, seed = blend
    stage = StageBlend(weights_D, block_size, seed)
    before_D = np.zeros(len(weights_D), dtype=np.int64)
    for n_samples in range(0, 150 * block_size, block_size):
        counts_D = stage.counts(n_samples)
        assert counts_D.dtype == np.int64
        assert counts_D.sum() == n_samples
        assert (counts_D >= before_D).all()
        assert not counts_D[weights_D == 0].any()
        for count, weight in zip(counts_D.tolist(), weights_D.tolist(), strict=True):
            assert abs(count * WEIGHT_TOTAL - n_samples * weight) < WEIGHT_TOTAL
        before_D = counts_D


def earliest_deadline_first(weights_D, ends):
    """Counts after each block, by the rule as it is stated, in integers without a limit."""
    counts = [0] * len(weights_D)
    for block, n in enumerate(ends):
        counts = [max(c, n * w // WEIGHT_TOTAL) for c, w in zip(counts, weights_D, strict=True)]
        waiting = []
        for d, (c, w) in enumerate(zip(counts, weights_D, strict=True)):
            if c * WEIGHT_TOTAL < n * w:
                needed = [
                    b for b in range(block, len(ends)) if ends[b] * w >= (c + 1) * WEIGHT_TOTAL
                ]
                deadline = needed[0] if needed else len(ends) + -(-(c + 1) * WEIGHT_TOTAL // w)
                waiting.append((deadline, c * WEIGHT_TOTAL - n * w, d))
        for _, _, d in sorted(waiting)[: n - sum(counts)]:
            counts[d] += 1
        yield counts


@given(
    blends(),
    st.none()
    | st.builds(BatchSizes.ramp_up, st.just(3), st.just(2), st.integers(1, 99), st.just(9)),
)
@settings(deadline=None, max_examples=40)
def test_passing_over_many_blocks_is_serving_the_earliest_deadlines_in_each(blend, sizes):
    weights_D, block_size, seed = blend
    sizes = sizes or BatchSizes.constant(block_size)
    ends = [int(sizes.samples_before(b)) for b in range(1, 400)]
    expected = list(earliest_deadline_first(weights_D.tolist(), ends))[:120]
    for blocks in (120, 33, 7):
        assert (
            StageBlend(weights_D, sizes, seed).counts(ends[blocks - 1]).tolist()
            == (expected[blocks - 1])
        )
    through = StageBlend(weights_D, sizes, seed)
    assert [through.counts(n).tolist() for n in ends[:120]] == expected


@given(blends())
@some
def test_each_domain_is_drawn_in_order_without_gap_or_repetition(blend):
    weights_D, block_size, seed = blend
    stage = StageBlend(weights_D, block_size, seed)
    drawn = Counter()
    for index in range(20 * block_size + block_size // 2):
        assert stage.counts(index).tolist() == [drawn[d] for d in range(len(weights_D))]
        domain, k = stage.locate(index)
        assert k == drawn[domain]
        drawn[domain] += 1


@given(blends(), st.lists(st.integers(0, 1500), min_size=1, max_size=40))
@some
def test_random_access_equals_reading_through(blend, indices):
    weights_D, block_size, seed = blend
    straight = StageBlend(weights_D, block_size, seed)
    expected = [straight.locate(index) for index in range(max(indices) + 1)]
    jumping = StageBlend(weights_D, block_size, seed)
    assert [jumping.locate(index) for index in indices] == [expected[index] for index in indices]
    for index in indices:
        drawn_D = np.bincount([domain for domain, _ in expected[:index]], minlength=len(weights_D))
        assert jumping.counts(index).tolist() == drawn_D.tolist()


def test_memory_stays_small_and_access_cheap_however_long_the_stage():
    stage = StageBlend(integer_weights([0.5, 0.3, 0.2]), 4, seed=0)
    expected = [stage.locate(index) for index in range(40_000)]
    assert len(pickle.dumps(stage)) < 20_000
    steps = []
    one_more_block = stage._one_more_block
    stage._one_more_block = lambda *args: steps.append(1) or one_more_block(*args)
    for index in (39_999, 17, 20_000, 0, 33_333):
        steps.clear()
        assert stage.locate(index) == expected[index]
        assert len(steps) <= 10_000 / 8


def test_an_answer_cannot_be_used_to_change_the_blend():
    stage = StageBlend(integer_weights([0.5, 0.5]), 8, seed=0)
    stage.counts(16)[:] = 99
    assert stage.counts(16).tolist() == [8, 8]


def test_the_order_within_a_block_depends_on_seed_stage_and_block():
    weights_D = integer_weights(np.full(8, 1 / 8))

    def order(seed=1, stage=2, block=3):
        return StageBlend(weights_D, 64, seed, stage).block(block).domains_N.tolist()

    assert order() == order()
    others = [order(seed=0), order(stage=0), order(block=0), order(seed=2**64 - 1)]
    assert all(other != order() for other in others)
    assert all(sorted(other) == sorted(order()) for other in others)


def test_within_blocks_every_place_is_as_likely_for_every_domain():
    stage = StageBlend(integer_weights(np.full(4, 1 / 4)), 4, seed=5)
    place_of_first = [stage.block(b).domains_N.tolist().index(0) for b in range(4000)]
    counts = np.bincount(place_of_first, minlength=4)
    assert abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_the_order_is_the_one_runs_so_far_were_trained_with():
    """Changing it breaks every checkpoint: its samples would be lost and repeated."""
    stage = StageBlend(integer_weights([0.5, 0.3, 0.2]), 10, seed=1234, stage=1)
    assert [stage.locate(index)[0] for index in range(20, 30)] == [0, 0, 1, 0, 0, 2, 1, 0, 1, 2]


def test_a_rare_domain_gets_its_samples():
    stage = StageBlend(integer_weights([1 - 1e-6, 1e-6]), 1024, seed=0)
    for n_samples in (1_024_000, 3_072_000):
        assert abs(stage.counts(n_samples)[1] - n_samples * 1e-6) < 1.01


def test_one_domain_and_ten_thousand():
    assert [StageBlend([WEIGHT_TOTAL], 4, 0).locate(i) for i in range(9)] == [
        (0, k) for k in range(9)
    ]
    rng = np.random.default_rng(0)
    weights_D = integer_weights(rng.dirichlet(np.full(10_000, 0.3)))
    stage = StageBlend(weights_D, 256, 0)
    for n_samples in (256, 2560, 25_600):
        deviation_D = stage.counts(n_samples) - n_samples * weights_D / WEIGHT_TOTAL
        assert abs(deviation_D).max() < 1


def test_counts_are_exact_up_to_the_longest_stage():
    weights_D = integer_weights([0.7, 0.2, 0.1 - 1e-9, 1e-9])
    block_size = 2**30 - 3
    stage = StageBlend(weights_D, block_size, 0)
    n_samples = 8 * block_size
    for count, weight in zip(stage.counts(n_samples).tolist(), weights_D.tolist(), strict=True):
        assert abs(count * WEIGHT_TOTAL - n_samples * weight) < WEIGHT_TOTAL
    with pytest.raises(IndexError):
        stage.counts(9 * block_size)


def test_what_is_out_of_range_is_refused():
    for weights_D in ([WEIGHT_TOTAL - 1], [WEIGHT_TOTAL + 1, -1], []):
        with pytest.raises(InputError, match="integer weights"):
            StageBlend(weights_D, 8, 0)
    with pytest.raises(InputError, match="block_size"):
        StageBlend([WEIGHT_TOTAL], 0, 0)
    with pytest.raises(InputError, match="seed"):
        StageBlend([WEIGHT_TOTAL], 8, -1)
    with pytest.raises(IndexError):
        StageBlend([WEIGHT_TOTAL], 8, 0).locate(-1)
