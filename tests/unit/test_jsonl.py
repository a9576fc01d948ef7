"""JSON lines of a file that a run may still be writing, or was killed over."""

from pathlib import Path

import pytest

from megatron_tikmix.jsonl import BadDocument, read_objects


def test_every_object_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}')
    assert read_objects(path, "{}") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("tail", [b'{"a": 2', b'{"a": "\xc3', b"2"])
def test_a_torn_tail_is_dropped_on_request_only(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert read_objects(path, "{}", torn_tail=True) == [{"a": 1}]
    with pytest.raises(BadDocument, match=r"rows\.jsonl: line 2:"):
        read_objects(path, "{}")


def test_a_bad_line_with_its_end_is_no_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"\n')
    with pytest.raises(BadDocument, match="line 2: malformed JSON"):
        read_objects(path, "{}", torn_tail=True)
