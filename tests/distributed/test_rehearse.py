"""`tikmix rehearse`: the memory that it tells is what a real run allocates, and what is planned."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.config import load_config
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.rehearsal import rehearse as rehearsal
from tests.conftest import VOCAB_SIZE, overridden
from tests.live_bytes import LiveBytes
from tests.ranks import run_on_ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
LARGE = ["--model.tensor_model_parallel_size", "8", "--model.pipeline_model_parallel_size", "4"]


def tikmix(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_tikmix.cli", "rehearse"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)


def rehearsed(folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "rehearsal.json"
    result = tikmix(*arguments, "--json", str(path))
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, Any] = json.loads(path.read_text())
    return found | {"text": result.stdout}


@pytest.mark.parametrize(
    "arguments",
    [
        ["1b.yaml", "--world_size", "512", *LARGE],
        pytest.param(["1b.yaml", "--world_size", "8"], marks=pytest.mark.slow),
        ["7b.yaml", "--world_size", "512", *LARGE],
        pytest.param(
            ["7b.yaml", "--world_size", "512", "--rank", "511", *LARGE], marks=pytest.mark.slow
        ),
        pytest.param(
            [
                *("7b.yaml", "--world_size", "512", *LARGE),
                *("--model.recompute_granularity", "full", "--model.recompute_method", "uniform"),
                *("--model.recompute_num_layers", "1"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_examples_at_their_size(arguments: list[str], tmp_path: Path) -> None:
    name, *rest = arguments
    numbers = ["--vocab_size", "32000", "--domains", "26", "--device_name", "h100"]
    found = rehearsed(tmp_path, str(EXAMPLES / name), *rest, *numbers)
    assert found["error"] is None
    assert "nothing is on the wrong device" in found["text"]
    step, opened, added = found["phases"]
    assert [phase["misplaced"] for phase in (step, opened, added)] == [{}, {}, {}]
    # Own host waits: none in a step; in a probe those of sums over ranks, whatever the sub-batches.
    assert {place.split("/")[1] for place in step["waits"]} == {"core"}
    assert sum(added["waits"].values()) == 1
    assert not any(each["group"] == "host" for each in step["traffic"])
    if "--rank" not in arguments:  # the plan is of the fullest rank, which is the first
        assert found["planned"] == pytest.approx(found["peak"], rel=0.05)
    # The formulas of a boundary's cost, against what is counted.
    cost = found["cost"]["sub_batch"]
    reduced = [
        t["nbytes"]
        for t in added["traffic"]
        if t["kind"].startswith("reduce_scatter") and t["group"] == "dp"
    ]
    if "--rank" not in arguments:
        assert sum(reduced) == pytest.approx(found["sub_batches"] * cost["reduced_bytes"], rel=0.01)
    sent = sum(t["count"] for t in added["traffic"] if t["kind"] == "send")
    if sent:
        assert sent == found["sub_batches"] * cost["micro_batches"]
    # As megatron-core lays it out: of the model once over TP × PP, in bf16, and its gradient.
    model = found["plan"]["rank_parameters"]
    kinds = {each["kind"] for each in step["traffic"]}
    assert {"allgather_base", "reduce_scatter_base"} <= kinds
    assert found["plan"]["weights"] == 2 * model


class RealPhases:
    """Takes the place of the watching device: the same phases with real tensors."""

    def __init__(self, live: LiveBytes) -> None:
        self._live = live
        self.peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._live.peak = self._live.now()
        yield
        self.peaks[name] = self._live.peak


def real_peaks(path: str) -> dict[str, int]:
    """What this rank allocates in each phase of a rehearsal, done for real."""
    config, _ = load_config([path])
    parallel = initialize(config.model, config.seed, 5)
    try:
        with LiveBytes() as live:
            real = RealPhases(live)
            rehearsal._act(real, config, parallel, VOCAB_SIZE, 3)  # type: ignore[arg-type]
    finally:
        shut_down()
    return real.peaks


@pytest.mark.parametrize(
    ("mode", "recomputed"),
    [
        ("sharded", False),
        ("replicated", True),
        pytest.param("sharded", True, marks=pytest.mark.slow),
        pytest.param("replicated", False, marks=pytest.mark.slow),
    ],
)
def test_peaks_are_those_of_a_real_run(
    mode: str, recomputed: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    larger: dict[str, Any] = {
        "probe.data_parallel_mode": mode,
        "model.num_layers": 6,
        "model.hidden_size": 64,
        "model.ffn_hidden_size": 256,
        "model.attention_backend": "local",
        "data.sequence_length": 128,
        "train.micro_batch_size": 2,
        "train.global_batch_size": 8,
    }
    if recomputed:
        larger |= {
            "model.recompute_granularity": "full",
            "model.recompute_method": "uniform",
            "model.recompute_num_layers": 1,
        }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(overridden(settings, larger)))
    real = run_on_ranks(real_peaks, 2, str(path))[0]
    numbers = ["--vocab_size", str(VOCAB_SIZE), "--domains", "3"]
    found = rehearsed(tmp_path, str(path), "--world_size", "2", *numbers)
    peaks = {phase["name"]: phase["peak"] for phase in found["phases"]}
    assert peaks.keys() < real.keys()
    for name, peak in peaks.items():
        assert peak == pytest.approx(real[name], rel=0.05), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["1b.yaml", "--world_size", "8", "--rank", "8"], "--rank 8 must be from 0 to 7"),
        (["1b.yaml", "--world_size", "8"], "give --vocab_size and --domains instead"),
        (["7b.yaml", "--world_size", "9", "--vocab_size", "9", "--domains", "2"], "multiple of"),
        (["none.yaml", "--world_size", "8"], "no such configuration file"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], words: str) -> None:
    result = tikmix(str(EXAMPLES / arguments[0]), *arguments[1:])
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_replicated_sub_batches_are_passed_on_every_rank(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Dealt out over six ranks, the last one has its share too, and needs as much memory."""
    path = tmp_path / "run.yaml"
    changes = {"probe.data_parallel_mode": "replicated", "train.global_batch_size": 12}
    changes |= {"remix.interval_samples": 48}
    path.write_text(yaml.safe_dump(overridden(settings, changes)))
    numbers = ["--vocab_size", str(VOCAB_SIZE), "--domains", "3", "--world_size", "6"]
    peaks = [
        rehearsed(tmp_path, str(path), *numbers, "--rank", rank)["phases"][-1]["peak"]
        for rank in ("0", "5")
    ]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
