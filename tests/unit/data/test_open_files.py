"""A bounded number of open files, and indices that lie on disk: the same samples all the same."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_tikmix.data import domain_stream, open_files
from megatron_tikmix.data.dataset import BlendedDataset, DataParallelLoader
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.domains import DomainManifest
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from tests.conftest import EOD, VOCAB_SIZE, write_tokens

SEQUENCE = 8


def streams(corpus: Path, index_folder: Path | None = None, copies: int = 1) -> list[DomainStream]:
    manifest = DomainManifest.load(corpus)
    return [
        DomainStream(
            f"{name}{copy}",
            manifest.split(name, "train"),
            seed=copy,
            sequence_length=SEQUENCE,
            eod=EOD,
            vocab_size=VOCAB_SIZE,
            index_folder=index_folder,
        )
        for copy in range(copies)
        for name in manifest.domains
    ]


def dataset(made: list[DomainStream]) -> BlendedDataset:
    names = [stream.name for stream in made]
    schedule = MixtureSchedule(names, 8, seed=1)
    weights = dict(zip(names, np.arange(1.0, len(names) + 1).tolist(), strict=True))
    schedule.append(0, Mixture(weights))
    return BlendedDataset(schedule, made)


def served(blended: BlendedDataset, start: int, samples: int, workers: int = 0) -> list[bytes]:
    loader = DataParallelLoader(
        blended,
        micro_batch_size=4,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=workers,
    )
    return [batch["tokens"].numpy().tobytes() for batch in loader.interval(start, samples)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_streams_share_a_bounded_number_of_open_files(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = open_files.RecentlyUsed[open_files._OpenTokens](2)
    expected = served(dataset(streams(corpus, copies=3)), 0, 400)
    monkeypatch.setattr(open_files, "OPEN_TOKEN_FILES", few)
    before = descriptors()
    made = streams(corpus, copies=3)
    assert descriptors() == before, "making a stream opens nothing"
    assert served(dataset(made), 0, 400) == expected
    assert len(few) == 2
    # Three for each open file, and those that megatron-core's own cache of 8 entries holds on to.
    assert descriptors() <= before + 3 * (2 + 8)


def test_what_a_worker_cannot_read_is_told_in_one_sentence(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(*arguments: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    made = streams(corpus)
    served(dataset(made), 0, 8)
    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(InputError) as caught:
        served(dataset(made), 0, 8, workers=1)
    told = str(caught.value)
    assert "cannot be read at byte" in told
    assert told.endswith("start again to resume from the newest checkpoint")
    assert "\n" not in told
    assert "Traceback" not in told


def test_a_replaced_file_is_another_file(tmp_path: Path) -> None:
    def first_tokens() -> list[int]:
        split = write_tokens(tmp_path / "d", [np.full(40, token)])
        os.utime(split.idx_path, ns=(token, token))
        stream = DomainStream("d", split, seed=0, sequence_length=8, eod=EOD, vocab_size=VOCAB_SIZE)
        return stream[0]["tokens"].tolist()

    for token in (3, 4):
        assert first_tokens() == [token] * 8


def test_large_indices_lie_on_disk_and_change_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = served(dataset(streams(corpus)), 64, 4000)
    monkeypatch.setattr(domain_stream, "SMALL_INDEX_BYTES", 0)
    builds = []
    build = DomainStream._build
    monkeypatch.setattr(
        DomainStream,
        "_build",
        lambda self, epoch, folder=None: builds.append(folder) or build(self, epoch, folder),
    )
    for attempt in range(2):
        builds.clear()
        made = streams(corpus, tmp_path)
        blended = dataset(made)
        first_D, end_D = (blended._schedule.domain_counts(n).tolist() for n in (64, 4064))
        epochs = [s.epochs_of(a, b) for s, a, b in zip(made, first_D, end_D, strict=True)]
        assert max(map(len, epochs)) > 2
        for stream, of_stream in zip(made, epochs, strict=True):
            stream.write_indices(of_stream)
        assert len(builds) == (0 if attempt else sum(map(len, epochs)))
        assert served(blended, 64, 4000) == expected
        assert not any(stream._epochs for stream in made), "none was built in memory"
    assert not list(tmp_path.glob("*.tmp"))
    # A folder that cannot be written, or that another node does not see.
    assert served(dataset(streams(corpus, tmp_path / "elsewhere")), 64, 4000) == expected
    (tmp_path / "file").touch()
    made = streams(corpus, tmp_path / "file")
    for stream in made:
        stream.write_indices([0])
    assert served(dataset(made), 64, 4000) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_serve_the_same_and_build_no_index(corpus: Path, workers: int) -> None:
    expected = served(dataset(streams(corpus)), 80, 1200)
    blended = dataset(streams(corpus))
    assert served(blended, 80, 1200, workers) == expected
    # One that was not prepared is refused there.
    blended.prepare = lambda start, samples: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="was not prepared"):
        served(blended, 8000, 40, workers)


def test_a_stage_appended_later_is_seen_by_the_next_interval(corpus: Path) -> None:
    made = streams(corpus)
    blended = dataset(made)
    served(blended, 0, 80, workers=2)
    blended._schedule.append(80, Mixture({"low0": 1, "high0": 0, "junk0": 0}))
    fresh = BlendedDataset(blended._schedule, streams(corpus))
    expected = [fresh[index]["tokens"].tolist() for index in range(80, 120)]
    assert {fresh[index]["domain"].item() for index in range(80, 120)} == {0}
    batches = served(blended, 80, 40, workers=2)
    tokens = np.concatenate([np.frombuffer(batch, dtype=np.int64) for batch in batches])
    assert tokens.reshape(-1, SEQUENCE).tolist() == expected


def test_a_manifest_that_is_not_of_these_files_is_told(tmp_path: Path) -> None:
    from dataclasses import replace

    split = write_tokens(tmp_path / "d", [np.full(40, 3)])
    stream = DomainStream(
        "d",
        replace(split, tokens=80),
        seed=0,
        sequence_length=8,
        eod=EOD,
        vocab_size=VOCAB_SIZE,
    )
    with pytest.raises(InputError, match="does not hold the 80 tokens"):
        stream[0]


def test_a_file_cut_short_while_it_is_open_is_named_with_the_offset(tmp_path: Path) -> None:
    """A mapped file would end the process by SIGBUS."""
    split = write_tokens(tmp_path / "x", [np.arange(1, 50), np.arange(50, 120)])
    tokens = open_files.TokenFile(split.prefix)
    assert tokens.get(1, 10, 5).tolist() == [60, 61, 62, 63, 64]
    assert tokens.get(0).tolist() == list(range(1, 50))
    assert tokens.get(1).tolist() == list(range(50, 120))
    os.truncate(split.bin_path, 2 * 100)
    with pytest.raises(InputError, match=f"{split.bin_path} ends before byte 200"):
        tokens.get(1, 40, 20)


def test_a_disk_that_fails_is_named_with_the_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = write_tokens(tmp_path / "x", [np.arange(1, 50)])
    tokens = open_files.TokenFile(split.prefix)

    def pread(*arguments: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", pread)
    words = f"{split.bin_path} cannot be read at byte 20: Input/output error"
    with pytest.raises(InputError, match=words):
        tokens.get(0, 10, 5)
