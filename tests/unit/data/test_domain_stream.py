"""Domain streams, loader and tasks: every sample once an epoch, on every rank, in one order."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_tikmix.config import TaskConfig
from megatron_tikmix.data import domain_stream
from megatron_tikmix.data.dataset import MicroBatchSampler
from megatron_tikmix.data.domain_stream import DomainStream, _EndOfDocument, some_documents
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.data.tasks import build_task, micro_batches
from megatron_tikmix.errors import InputError
from megatron_tikmix.seeds import derived_seed
from tests.conftest import EOD, VOCAB_SIZE, write_tokens

SEQUENCE = 32


def stream(corpus: Path, name: str = "low", seed: int = 3, length: int = SEQUENCE) -> DomainStream:
    manifest = DomainManifest.load(corpus)
    return DomainStream(
        name,
        manifest.split(name, "train"),
        seed=seed,
        sequence_length=length,
        eod=manifest.eod,
        vocab_size=manifest.vocab_size,
    )


def contents(samples: DomainStream, ks: range) -> list[bytes]:
    return [samples[k]["tokens"].numpy().tobytes() for k in ks]


def test_an_epoch_serves_floor_of_tokens_over_length_samples(corpus: Path) -> None:
    samples = stream(corpus)
    tokens = DomainManifest.load(corpus).split("low", "train").tokens
    assert samples.samples_per_epoch == (tokens - 1) // SEQUENCE
    first = contents(samples, range(samples.samples_per_epoch))
    assert len(set(first)) == samples.samples_per_epoch


def test_every_epoch_serves_each_token_once(corpus: Path) -> None:
    """Counted by token: an epoch drops only the tail, at most sequence_length of them."""
    samples = stream(corpus)
    prefix = DomainManifest.load(corpus).split("low", "train").prefix
    documents = IndexedDataset(str(prefix))
    everything = np.bincount(np.concatenate([documents[i] for i in range(len(documents))]))
    n = samples.samples_per_epoch
    for epoch in range(2):
        served = torch.cat([samples[epoch * n + k]["tokens"] for k in range(n)])
        missing = everything - np.bincount(served, minlength=len(everything))
        assert missing.min() >= 0
        assert missing.sum() == everything.sum() - n * SEQUENCE <= SEQUENCE


def test_sample_k_depends_on_nothing_but_seed_domain_and_k(corpus: Path) -> None:
    one, other = stream(corpus), stream(corpus)
    n = one.samples_per_epoch
    forwards = contents(one, range(2 * n))
    backwards = contents(other, range(2 * n - 1, -1, -1))
    assert forwards == backwards[::-1]
    assert forwards[:n] != forwards[n:], "the second epoch has an order of its own"
    assert contents(stream(corpus, seed=4), range(n)) != forwards[:n]


def test_samples_do_not_share_memory(corpus: Path) -> None:
    samples = stream(corpus)
    samples[0]["loss_mask"].zero_()
    assert samples[1]["loss_mask"].sum() == SEQUENCE


def test_samples_are_those_of_megatrons_own_dataset(corpus: Path) -> None:
    split = DomainManifest.load(corpus).split("low", "train")
    config = GPTDatasetConfig(
        random_seed=derived_seed(3, "low", 0),
        sequence_length=SEQUENCE,
        tokenizer=_EndOfDocument(EOD, VOCAB_SIZE),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = IndexedDataset(str(split.prefix))
    documents = np.arange(split.documents, dtype=np.int32)
    expected = GPTDataset(tokens, None, documents, None, Split.train, config)
    samples = stream(corpus, "low", seed=3)
    assert samples.samples_per_epoch == len(expected)
    for k in range(len(expected)):
        assert samples[k].keys() == expected[k].keys()
        for name, value in expected[k].items():
            assert samples[k][name].equal(value)
            assert samples[k][name].dtype == value.dtype


@given(
    seed=st.integers(0, 1000),
    documents=st.integers(1, 200_000),
    spread=st.floats(0, 4),
    samples=st.integers(1, 500),
    length=st.sampled_from([128, 4096]),
)
def test_some_documents_are_enough_for_what_is_read(
    seed: int, documents: int, spread: float, samples: int, length: int
) -> None:
    """Whatever their lengths: twice the tokens, no document twice, and no few that hold it all."""
    lengths = np.random.default_rng(seed).lognormal(4, spread, documents).astype(np.int32) + 1
    tokens = int(lengths.sum())
    asked = {"samples": samples, "sequence_length": length, "seed": 5}
    drawn = some_documents(lengths, tokens, **asked)
    if drawn is None:
        return
    assert len(np.unique(drawn)) == len(drawn) <= documents // 2
    held = lengths[drawn].astype(float)
    assert held.sum() >= 2 * samples * length
    # Two tokens drawn at random are of the same document once in 4 × samples times, or less.
    assert np.sum((held / held.sum()) ** 2) <= 1 / (4 * samples) * (1 + 1e-9)
    again = some_documents(lengths, tokens, **asked)
    assert again is not None
    assert again.tolist() == drawn.tolist()


def test_a_few_documents_that_are_most_of_a_domain_are_not_left_to_chance() -> None:
    """300 dumps among a million lines; a draw of lines alone would not fill a sample."""
    lengths = np.full(1_000_000, 20, dtype=np.int32)
    lengths[::3333] = 2_000_000
    tokens = int(lengths.sum(dtype=np.int64))
    assert some_documents(lengths, tokens, samples=64, sequence_length=8192, seed=1) is None
    alike = np.full(1_000_000, 600, dtype=np.int32)
    drawn = some_documents(alike, 600_000_000, samples=64, sequence_length=8192, seed=1)
    assert drawn is not None
    assert len(drawn) <= 4096


def test_a_large_domain_is_probed_through_an_index_of_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples read are made of the domain's tokens, and another seed draws other documents."""
    monkeypatch.setattr(domain_stream, "SMALL_INDEX_BYTES", 0)
    documents = [np.full(20, 1 + number, dtype=np.int64) for number in range(4000)]
    split = write_tokens(tmp_path / "large", documents)

    def first(seed: int) -> set[int]:
        drawn = some_documents(
            np.full(4000, 20, dtype=np.int32),
            split.tokens,
            samples=8,
            sequence_length=SEQUENCE,
            seed=seed,
        )
        assert drawn is not None
        assert len(drawn) < 300
        samples = DomainStream(
            "large",
            split,
            seed=seed,
            sequence_length=SEQUENCE,
            eod=0,
            vocab_size=5000,
            documents=drawn,
        )
        assert samples.samples_per_epoch >= 16
        read = torch.cat([samples[k]["tokens"] for k in range(8)])
        assert set(read.tolist()) <= {1 + int(number) for number in drawn}
        return set(read.tolist())

    assert len(first(1)) > 8
    assert len(first(1) & first(2)) < 5


def test_too_few_tokens_for_a_sample_are_refused(corpus: Path) -> None:
    with pytest.raises(InputError, match=r"domain low: .* do not fill one sample"):
        stream(corpus, length=100_000)


@given(
    start=st.integers(0, 100),
    micro_batch_size=st.integers(1, 5),
    size=st.integers(1, 5),
    groups=st.integers(1, 6),
)
def test_ranks_share_the_samples_out_once_each(
    start: int, micro_batch_size: int, size: int, groups: int
) -> None:
    samples = groups * micro_batch_size * size
    served = [
        index
        for rank in range(size)
        for batch in MicroBatchSampler(
            start, samples, micro_batch_size=micro_batch_size, rank=rank, size=size
        )
        for index in batch
    ]
    assert sorted(served) == list(range(start, start + samples))


@pytest.mark.parametrize(("micro_batch_size", "size"), [(1, 1), (2, 1), (3, 2), (5, 4)])
def test_padding_counts_for_nothing(corpus: Path, micro_batch_size: int, size: int) -> None:
    samples = stream(corpus)
    batches = [
        batch
        for rank in range(size)
        for batch in micro_batches(
            samples, range(4, 11), micro_batch_size=micro_batch_size, rank=rank, size=size
        )
    ]
    counted = [
        row["tokens"][i].numpy().tobytes()
        for row in batches
        for i in range(micro_batch_size)
        if row["loss_mask"][i].any()
    ]
    assert sorted(counted) == sorted(contents(samples, range(4, 11)))


def test_items_that_decide_and_items_that_report_share_no_document(corpus: Path) -> None:
    manifest = DomainManifest.load(corpus)
    task = build_task("t", TaskConfig(domain="high"), manifest, seed=1, sequence_length=SEQUENCE)
    decide, report = set(task.decide._documents.tolist()), set(task.report._documents.tolist())
    assert not decide & report
    assert len(decide | report) == manifest.split("high", "validation").documents
    assert abs(task.decide.samples_per_epoch - task.report.samples_per_epoch) <= 4
