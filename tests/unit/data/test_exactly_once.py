"""Whatever is done to a run, every domain's samples come in order, once an epoch.

Token values are unique within a domain, so that each sample is known by its tokens.
"""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tikmix.data.dataset import BlendedDataset, DataParallelLoader
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.domains import DomainSplit
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL, Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from tests.conftest import write_tokens

SEQUENCE, MICRO, VOCAB = 4, 1, 1000
SIZES = {"large": 203, "small": 41, "tiny": 9}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DomainSplit]:
    folder = tmp_path_factory.mktemp("unique")
    return {
        name: write_tokens(folder / name, np.array_split(1 + np.arange(tokens), 5))
        for name, tokens in SIZES.items()
    }


def open_streams(splits: dict[str, DomainSplit]) -> list[DomainStream]:
    return [
        DomainStream(name, split, seed=7, sequence_length=SEQUENCE, eod=0, vocab_size=VOCAB)
        for name, split in splits.items()
    ]


@st.composite
def histories(
    draw: st.DrawFn,
) -> tuple[BatchSizes, list[tuple[list[float], list[tuple[int, int]]]]]:
    """Batch sizes; and stages, each a mixture and its legs: (iterations, data-parallel size).

    Between two legs the run is stopped and resumed.
    """
    sizes = draw(
        st.sampled_from([BatchSizes.constant(12)])
        | st.builds(BatchSizes.ramp_up, st.just(12), st.just(12), st.integers(1, 150), st.just(36))
    )
    weight = st.sampled_from([0.0, 1e-6, 0.1, 0.5, 1.0])
    legs = st.lists(
        st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 3, 4])), min_size=1, max_size=3
    )
    mixtures = st.lists(weight, min_size=3, max_size=3).filter(any)
    return sizes, draw(st.lists(st.tuples(mixtures, legs), min_size=1, max_size=4))


@given(history=histories())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_once_each_over_reweightings_resumes_and_layouts(
    splits: dict[str, DomainSplit],
    history: tuple[BatchSizes, list[tuple[list[float], list[tuple[int, int]]]]],
) -> None:
    sizes, stages = history
    schedule = MixtureSchedule(list(SIZES), sizes, seed=5)
    iteration = consumed = 0
    served: list[list[tuple[int, ...]]] = [[] for _ in SIZES]  # by domain, in training's order
    for weights, legs in stages:
        schedule.append(consumed, Mixture(dict(zip(SIZES, weights, strict=True))))
        begun, before_D = consumed, [len(samples) for samples in served]
        for iterations, data_parallel_size in legs:
            schedule = resumed(schedule, consumed)
            until = int(sizes.samples_before(iteration + iterations))
            dataset = BlendedDataset(schedule, open_streams(splits))
            for domain, sample in in_order(dataset, consumed, until, data_parallel_size):
                served[domain].append(sample)
            iteration, consumed = iteration + iterations, until
            # Within a sample of the mixture, and what the accounting says.
            drawn = [len(samples) for samples in served]
            assert schedule.domain_counts(consumed).tolist() == drawn
            for now, then, weight in zip(
                drawn, before_D, schedule.stages[-1].integer_weights_D.tolist(), strict=True
            ):
                assert abs((now - then) * WEIGHT_TOTAL - (consumed - begun) * weight) < WEIGHT_TOTAL
    assert sum(map(len, served)) == consumed
    for samples, tokens in zip(served, SIZES.values(), strict=True):
        per_epoch = (tokens - 1) // SEQUENCE
        for first in range(0, len(samples), per_epoch):
            epoch = [token for sample in samples[first : first + per_epoch] for token in sample]
            assert len(set(epoch)) == len(epoch), "no token twice in an epoch"
    # And the samples are those of a run that was never stopped, nor its mixture changed.
    for samples, stream in zip(served, open_streams(splits), strict=True):
        assert samples == [tuple(stream[k]["tokens"].tolist()) for k in range(len(samples))]


def resumed(schedule: MixtureSchedule, consumed: int) -> MixtureSchedule:
    counts = schedule.domain_counts(consumed).tolist()
    return MixtureSchedule.from_json(json.loads(json.dumps(schedule.to_json())), consumed, counts)


def in_order(
    dataset: BlendedDataset, start: int, end: int, size: int
) -> Sequence[tuple[int, tuple[int, ...]]]:
    """(domain, tokens) of the samples that all ranks read, in the order of their indices."""
    ranks = [
        DataParallelLoader(
            dataset,
            micro_batch_size=MICRO,
            data_parallel_rank=rank,
            data_parallel_size=size,
            num_workers=0,
        ).interval(start, end - start)
        for rank in range(size)
    ]
    found = []
    for group in zip(*ranks, strict=True):
        for batch in group:
            rows = zip(batch["domain"].tolist(), batch["tokens"].tolist(), strict=True)
            found += [(domain, tuple(tokens)) for domain, tokens in rows]
    return found
