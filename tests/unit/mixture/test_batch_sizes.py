import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.batch_sizes import BatchSizes


@st.composite
def ramps(draw):
    start, increment = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    size = start + increment * draw(st.integers(1, 12))
    return start, increment, draw(st.integers(1, 3000)), size


@given(ramps())
def test_a_ramp_up_is_that_of_megatron_core(ramp):
    start, increment, samples, size = ramp
    sizes = BatchSizes.ramp_up(*ramp)
    theirs = RampupBatchsizeNumMicroBatchesCalculator(
        size, 1, 1, False, 1, start, increment, samples
    )
    consumed = 0
    for iteration in range(2 * samples // start + 5):
        theirs.update(consumed, consistency_check=True)
        assert sizes.size_at(consumed) == theirs.get_current_global_batch_size()
        assert int(sizes.samples_before(iteration)) == consumed
        consumed += theirs.get_current_global_batch_size()
    assert sizes.size == size == theirs.get_current_global_batch_size()


@given(ramps(), st.integers(0, 40))
def test_positions_against_a_list_of_all_batches(ramp, from_batch):
    sizes = BatchSizes.ramp_up(*ramp)
    ends = np.cumsum([0] + [sizes.size_at(int(sizes.samples_before(b))) for b in range(60)])
    assert sizes.samples_before(np.arange(61)).tolist() == ends.tolist()
    for sample in range(0, int(ends[-1]), 7):
        number = int(sizes.batch_of(sample))
        assert ends[number] <= sample < ends[number + 1]
        assert sizes.is_end(sample) == (sample in ends)
        assert sizes.end_from(sample) == min(end for end in ends if end >= sample)
    later = sizes.after(int(ends[from_batch]))
    assert (later.samples_before(np.arange(20)) + ends[from_batch]).tolist() == (
        ends[from_batch : from_batch + 20].tolist()
    )
    assert BatchSizes(sizes.to_json()) == sizes


def test_sizes_that_cannot_be_are_refused():
    for steps in ([], [(8, 8)], [(0, 8), (12, 4)], [(0, 8), (8, 0)], [(0, 8), (0, 4)]):
        with pytest.raises(InputError, match="batch"):
            BatchSizes(steps)
    for ramp in ((8, 4, 100, 8), (2, 4, 100, 8), (0, 4, 100, 8), (4, 4, 0, 8)):
        with pytest.raises(InputError, match="ramp-up"):
            BatchSizes.ramp_up(*ramp)
