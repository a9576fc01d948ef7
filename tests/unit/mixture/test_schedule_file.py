"""A whole schedule from a file or from another run: the same stages, or a clear refusal."""

import json

import pytest
import yaml

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.mixture.schedule_file import ScheduleFile

DOMAINS = ["c", "a", "b"]
EIGHT = BatchSizes.constant(8)
STAGES = [
    {"start_sample": 0, "weights": {"a": 1, "b": 1}},
    {"start_sample": 16, "weights": {"a": 0.123, "b": 0.456, "c": 0.421}},
]


def expected(blocks=EIGHT, seed=3):
    schedule = MixtureSchedule(DOMAINS, blocks, seed)
    schedule.append(0, Mixture({"a": 1, "b": 1, "c": 0}))
    schedule.append(16, Mixture(STAGES[1]["weights"]))
    return schedule


def written(path, content):
    path.write_text(content)
    return path


def test_yaml_json_and_a_bare_list_are_the_same(tmp_path):
    for name, content in (
        ("s.yaml", yaml.safe_dump({"stages": STAGES})),
        ("s.json", json.dumps({"stages": STAGES})),
        ("list.yaml", yaml.safe_dump(STAGES)),
        ("list.jsonl", "\n".join(map(json.dumps, STAGES))),
    ):
        file = ScheduleFile.read(written(tmp_path / name, content))
        assert file.schedule(DOMAINS, EIGHT, 3).digest() == expected().digest()


def a_run(folder, seed=3):
    """The folder of a run that followed `expected`."""
    schedule = expected(seed=seed)
    rows = [
        {
            "start_sample": stage.start_sample,
            "weights": schedule.mixture(stage.index).to_json(),
            "bank": None,
        }
        for stage in schedule.stages
    ]
    folder.mkdir()
    written(folder / "mixture.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    config = {"seed": seed, "train": {"global_batch_size": 8, "rampup_batch_size": None}}
    written(folder / "config.yaml", yaml.safe_dump(config))
    return schedule


def test_a_run_is_followed_to_the_bit(tmp_path):
    schedule = a_run(tmp_path / "run")
    mine = {"seed": 3, "train.global_batch_size": 8, "train.rampup_batch_size": None}
    for path in (tmp_path / "run", tmp_path / "run" / "mixture.jsonl"):
        file = ScheduleFile.read(path)
        assert file.schedule(DOMAINS, EIGHT, 3).digest() == schedule.digest()
        assert file.differences(mine, DOMAINS) == []
        assert file.differences({**mine, "seed": 4}, DOMAINS) == ["seed was 3 and is 4"]
        assert "order" in file.differences(mine, sorted(DOMAINS))[0]
        assert (
            "train.global_batch_size"
            in file.differences({**mine, "train.global_batch_size": 16}, DOMAINS)[0]
        )


BAD = {
    "no schedule": ({"mixture": 3}, "holds no schedule"),
    "no stages": ([], "holds no schedule"),
    "a field missing": ([{"start_sample": 0}], "stage 0 must have the fields"),
    "not samples": ([{"start_sample": 1.5, "weights": {"a": 1}}], "stage 0: start_sample must be"),
    "no weights": ([{"start_sample": 0, "weights": {}}], "stage 0: weights must give"),
    "unknown domain": ([{"start_sample": 0, "weights": {"x": 1}}], "stage 0: unknown domains x;"),
    "negative": ([{"start_sample": 0, "weights": {"a": -1}}], "stage 0: mixture: the weight of"),
    "text": ([{"start_sample": 0, "weights": {"a": "1"}}], "stage 0: mixture: the weight of"),
    "not from 0": (
        [{"start_sample": 8, "weights": {"a": 1}}],
        "first stage must start at sample 0",
    ),
    "within a batch": (
        [STAGES[0], {**STAGES[1], "start_sample": 20}],
        "stage 1: start_sample 20 is within a global batch; the nearest ends of batches are 16 "
        "and 24",
    ),
    "backwards": ([*STAGES, {**STAGES[1], "start_sample": 8}], "stage 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(tmp_path, case):
    content, message = BAD[case]
    path = written(tmp_path / "s.yaml", yaml.safe_dump(content))
    with pytest.raises(InputError) as caught:
        ScheduleFile.read(path).schedule(DOMAINS, EIGHT, 3)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such schedule"):
        ScheduleFile.read(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="no such schedule"):
        ScheduleFile.read(tmp_path)
    with pytest.raises(InputError, match="neither YAML nor JSON"):
        ScheduleFile.read(written(tmp_path / "s.yaml", "a: [1"))
    with pytest.raises(InputError, match=r"s\.jsonl: line 2: malformed JSON"):
        ScheduleFile.read(written(tmp_path / "s.jsonl", '{"a": 1}\n{"a": 1'))
