"""The files of a run: appended whole, read back as far as they are whole."""

import json

import numpy as np
import pytest

from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import append_jsonl, read_jsonl
from megatron_tikmix.monitoring.files import RunFiles


def test_rows_come_back_as_they_went(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"iteration": 1, "domain_loss": {"a/ä\n": 0.1 + 0.2}},
        {"iteration": 2, "list": [1, None]},
    ]
    for row in rows:
        append_jsonl(path, row)
    assert read_jsonl(path) == rows
    assert path.read_text().count("\n") == 2


def test_numbers_that_json_lacks_become_null(tmp_path):
    path = tmp_path / "rows.jsonl"
    values = [float("nan"), float("inf"), np.float32("nan"), np.array([1.5, -np.inf])]
    append_jsonl(path, {"nested": {"values": values}, "count": np.int64(3)})
    assert (
        path.read_text() == '{"nested": {"values": [null, null, null, [1.5, null]]}, "count": 3}\n'
    )


def test_a_torn_last_line_is_dropped_and_mended_by_the_next_append(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2, "b"')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


def test_a_last_line_that_only_lacks_its_end_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}')
    assert read_jsonl(path) == [{"a": 1}]
    append_jsonl(path, {"a": 2})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("bad", ['{"a": ', "[1]", "\udc80"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad.encode("utf-8", "surrogateescape") + b'\n{"a": 2}\n')
    with pytest.raises(InputError, match=r"rows\.jsonl: line 2"):
        read_jsonl(path)


def test_an_unfinished_run_directory_reads_as_empty(tmp_path):
    files = RunFiles(tmp_path)
    assert (files.config, files.metrics, list(files.ledger)) == ({}, [], [])


def test_what_a_resumed_run_wrote_again_replaces_the_first_version(tmp_path):
    for iteration, loss in [(10, 3.0), (20, 2.0), (30, 9.0), (20, 2.5), (30, 1.5)]:
        append_jsonl(tmp_path / "metrics.jsonl", {"iteration": iteration, "lm_loss": loss})
    metrics = RunFiles(tmp_path).metrics
    assert [(row["iteration"], row["lm_loss"]) for row in metrics] == [
        (10, 3.0),
        (20, 2.5),
        (30, 1.5),
    ]


def test_a_missing_directory_and_a_broken_config_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        RunFiles(tmp_path / "nowhere")
    (tmp_path / "config.yaml").write_text("a: [1,")
    with pytest.raises(InputError, match=r"config\.yaml"):
        _ = RunFiles(tmp_path).config


def test_the_run_generator_writes_plain_json(tmp_path):
    from tests.make_run import make_run

    ledger, metrics = make_run(tmp_path, ["a", "b"], ["t"], stages=2, seed=0)
    assert json.loads((tmp_path / "mixture.jsonl").read_text().splitlines()[1]) == ledger[1]
    assert RunFiles(tmp_path).metrics == metrics
