"""Which changes a resumed run is refused for, and in which words."""

from typing import Any

import pytest

from megatron_tikmix.training.fingerprint import difference

SAVED: dict[str, Any] = {
    "seed": 1,
    "domains": ["web", "code"],
    "tokens": {"web": 100, "code": 50},
    "files": {"web": "aa", "code": None},
    "tokenizer": "t1",
    "model.num_layers": 4,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"seed": 2}, "with seed 1, and the run has 2"),
        ({"tokens": {"web": 100, "code": 51}}, "with tokens of code 50, and the run has 51"),
        ({"files": {"web": "ab", "code": "cc"}}, "with files of web aa, and the run has ab"),
        ({"files": {"web": None, "code": "cc"}}, None),
        ({"tokenizer": "t2"}, "with tokenizer t1, and the run has t2"),
        ({"tokenizer": None}, None),
        ({"domains": ["web"]}, "with domains code, which the run does not have"),
        ({"domains": ["web", "code", "law"]}, "without domains law, which the run has added"),
        ({"domains": ["code", "web"]}, "with domains ['web', 'code'], and the run has"),
        ({"model.num_layers": 8}, "with model.num_layers 4, and the run has 8"),
    ],
)
def test_what_changed_is_named(changes: dict[str, Any], words: str | None) -> None:
    found = difference(SAVED, SAVED | changes)
    assert (found is None) == (words is None)
    assert words is None or words in str(found)
    gone = "domains" in changes and len(changes["domains"]) < 2  # which nothing allows
    assert (difference(SAVED, SAVED | changes, allowed=list(changes)) is None) == (not gone)


def test_only_what_both_know_is_compared() -> None:
    assert difference(SAVED, {"seed": 1}) is None
    assert difference({"seed": 1}, SAVED) is None
