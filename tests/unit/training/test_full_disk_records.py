"""A disk that is full while a run is written down costs TensorBoard's events, and nothing else."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_tikmix.decision.ledger import Ledger, Measured, StageRow
from megatron_tikmix.jsonl import append_jsonl, read_jsonl
from megatron_tikmix.monitoring.tensorboard import TensorBoardWriter
from megatron_tikmix.training import record
from megatron_tikmix.training.loop import train
from tests.conftest import overridden, without_timings
from tests.one_rank import one_rank


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The kernel refuses, in this process, to write beyond this many bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"a": 1})
    with no_file_beyond(path.stat().st_size + 5), pytest.raises(OSError, match="too large"):
        append_jsonl(path, {"b": 2})
    assert path.read_text() == '{"a": 1}\n'


def trained(settings: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    settings = overridden(settings, {"run_dir": str(folder / "run")})
    with one_rank(settings, folder) as run:
        run.config.train.log_interval = 1
        run.recorder.open_folder()
        run.recorder.begin("", run.state)
        train(run)
        run.recorder.close()
    return folder / "run"


# Of TensorBoard's writing thread, which ends by the error that the run is told of.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_events_only(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = trained(settings, tmp_path / "whole")
    full = range(7, 11)  # of these iterations, a boundary among them

    def limited(write: Any) -> Any:
        def limited_write(owner: Any, row: Any, *arguments: Any) -> Any:
            plain = row.to_json() if isinstance(row, StageRow) else row
            iteration = plain.get("iteration", plain.get("start_iteration"))
            with no_file_beyond(10 if iteration in full else resource.RLIM_INFINITY):
                written = write(owner, row, *arguments)
                if isinstance(owner, TensorBoardWriter):
                    owner._writer.flush()  # by its thread, before the limit changes
                return written

        return limited_write

    monkeypatch.setattr(record.RowFile, "append", limited(record.RowFile.append))
    for name in ("step", "stage"):
        monkeypatch.setattr(TensorBoardWriter, name, limited(getattr(TensorBoardWriter, name)))
    found = trained(settings, tmp_path / "found")

    for name in ("metrics.jsonl", "mixture.jsonl"):
        rows, expected = read_jsonl(found / name), read_jsonl(whole / name)
        assert without_timings(rows) == without_timings(expected)
    messages = [entry.getMessage() for entry in caplog.records]
    refused = [text for text in messages if "WAS NOT WRITTEN" in text]
    assert len(refused) == 2
    assert f"A ROW OF {found / 'metrics.jsonl'} WAS NOT WRITTEN: File too large" in refused[0]
    assert sum("TENSORBOARD'S EVENTS ARE NOT WRITTEN" in text for text in messages) == 1
    assert f"{found / 'metrics.jsonl'} is whole again: 4 rows were written late" in messages

    events = EventAccumulator(str(found / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("lm loss")]
    last = read_jsonl(whole / "metrics.jsonl")[-1]["iteration"]
    assert steps == [step for step in range(1, last + 1) if step not in full]


def test_a_bank_that_has_no_room_stays_in_its_row(
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = trained(settings, tmp_path / "whole")
    write = record.filed

    def limited_write(row: StageRow, run_dir: Path) -> StageRow:
        with no_file_beyond(100 if row.stage == 1 else resource.RLIM_INFINITY):
            return write(row, run_dir)

    monkeypatch.setattr(record, "filed", limited_write)
    found = trained(settings, tmp_path / "found")
    (message,) = [text for text in caplog.messages if "THE BANK OF STAGE" in text]
    assert "stays" not in message
    assert "is kept in the row of mixture.jsonl" in message
    rows = [Ledger.read(folder) for folder in (whole, found)]
    assert isinstance(rows[1][1].measured, Measured)
    for one, other in zip(*rows, strict=True):
        first, second = one.read_measured(), other.read_measured()
        assert (first and first.to_json()) == (second and second.to_json())
    assert not list((found / "banks").glob("*.unfinished"))
