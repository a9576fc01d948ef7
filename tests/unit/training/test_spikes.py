"""What counts as a loss spike."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tikmix.training.state import SMOOTHING, LossSpikes

TOKENS = {"easy": 100.0, "hard": 100.0}


def seen(rows: list[dict[str, float]], tokens: dict[str, float]) -> LossSpikes:
    spikes = LossSpikes()
    for row in rows:
        assert spikes.see(row, tokens, 1.5) is None
    return spikes


def test_a_loss_far_above_that_of_late_is_a_spike_and_counted() -> None:
    spikes = seen([{"easy": 1.0, "hard": 4.0}] * 5, TOKENS)
    assert spikes.see({"easy": 2.0, "hard": 8.0}, TOKENS, 1.5) == pytest.approx(2.0)
    assert spikes.count == 1
    assert spikes.usual == pytest.approx({"easy": 1 + SMOOTHING, "hard": 4 * (1 + SMOOTHING)})


def test_a_mixture_that_moves_to_harder_domains_is_none() -> None:
    """The mean goes from 1.3 to 3.7; each domain's loss stays."""
    spikes = seen([{"easy": 1.0, "hard": 4.0}] * 5, {"easy": 90.0, "hard": 10.0})
    assert spikes.see({"easy": 1.0, "hard": 4.0}, {"easy": 10.0, "hard": 90.0}, 1.5) is None
    assert spikes.see({"new": 9.0}, {"new": 5.0}, 1.5) is None, "nothing to compare it with"


def test_without_a_factor_there_is_none() -> None:
    assert LossSpikes(usual={"easy": 1.0}).see({"easy": 50.0}, TOKENS, None) is None


@given(
    st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=1),
    st.floats(0.1, 5).filter(lambda factor: abs(factor - 1.5) > 1e-6),
)
def test_it_is_one_just_when_all_losses_grow_by_more_than_the_factor(
    usual: dict[str, float], growth: float
) -> None:
    tokens = {name: 1.0 + position for position, name in enumerate(usual)}
    grown = {name: growth * loss for name, loss in usual.items()}
    found = LossSpikes(usual=dict(usual)).see(grown, tokens, 1.5)
    assert (found is not None) == (growth > 1.5)
