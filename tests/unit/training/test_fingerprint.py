"""Which changes a resumed run is refused for, and in which words."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.config import load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.training.checkpoint import difference, fingerprint
from tests.conftest import overridden

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


def test_it_is_what_comes_back_from_json(settings: dict[str, Any], tmp_path: Path) -> None:
    """Or every resumed run would be refused."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(overridden(settings, {"model.window_size": [8, 0]})))
    config, _ = load_config([str(path)])
    now = fingerprint(config, TrainingData(config))
    assert difference(json.loads(json.dumps(now)), now) is None
    assert "model.window_size" in now
    config.model.rotary_interleaved = True
    other = fingerprint(config, TrainingData(config))
    assert "with model.rotary_interleaved False" in (difference(now, other) or "")


def test_only_what_both_know_is_compared() -> None:
    assert difference(SAVED, {"seed": 1}) is None
    assert difference({"seed": 1}, SAVED) is None
