"""NVIDIA's own loop as a host: real `megatron.training`, whole and stopped and resumed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, read_rows, without_timings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="megatron.training comes with megatron-core 0.17 or newer",
)

ARGUMENTS = """
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
    --micro-batch-size 2 --global-batch-size 8 --train-iters 16
    --lr 2e-3 --min-lr 0 --lr-decay-style cosine --adam-beta2 0.2 --weight-decay 0.01
    --tokenizer-type NullTokenizer --vocab-size 255 --make-vocab-size-divisible-by 64
    --transformer-impl local --no-masked-softmax-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
    --no-gradient-accumulation-fusion --hidden-dropout 0.1 --attention-dropout 0.1
    --use-distributed-optimizer --distributed-backend gloo --log-interval 1
    --eval-iters 0 --eval-interval 1000
    --seed 1234 --num-workers 0 --save-interval 1000 --ckpt-format torch_dist
"""
LAYOUTS: dict[str, tuple[int, str, int]] = {
    # ranks, arguments, and the iteration at which the run is stopped
    "one rank, stopped inside an interval": (1, "", 6),
    "data parallel, stopped at a boundary": (2, "", 8),
    "pipeline in bf16, stopped at a boundary": (2, "--pipeline-model-parallel-size 2 --bf16", 8),
    "tensor parallel": (2, "--tensor-model-parallel-size 2", 6),
}


@pytest.fixture
def tikmix(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "data": {"manifest": str(corpus), "initial_mixture": "uniform"},
        "tasks": {"low": {"domain": "low"}, "high": {"domain": "high"}},
        "remix": {"interval_samples": 32, "influence": "marginal"},
        "probe": {"sub_batch_samples": 4, "task_samples": 12, "max_overhead": None},
    }


def megatron(
    ranks: int, save: Path, tikmix: dict[str, Any] | None, *more: str
) -> subprocess.CompletedProcess[str]:
    """A Megatron command, through the launcher; with its one argument more if `tikmix` is given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "megatron_tikmix.hosts.megatron_lm"]
    command += [str(ROOT / "examples" / "megatron_lm" / "pretrain_gpt.py"), *ARGUMENTS.split()]
    command += ["--save", str(save), "--load", str(save), *more]
    if tikmix is not None:
        path = save.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tikmix))
        command += ["--tikmix-config", str(path)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=save.parent, check=False
    )


def steps(*results: subprocess.CompletedProcess[str]) -> dict[int, tuple[str, str]]:
    """Loss and gradient norm as Megatron's log has them, by iteration, of runs that ended well."""
    for result in results:
        assert result.returncode == 0, result.stderr[-2000:]
    return logged(*results)


def logged(*results: subprocess.CompletedProcess[str]) -> dict[int, tuple[str, str]]:
    found = {}
    for result in results:
        for line in result.stdout.splitlines():
            row = re.search(r"iteration +(\d+)/.*lm loss: (\S+).*grad norm: (\S+)", line)
            if row is not None:
                found[int(row[1])] = (row[2], row[3])
    return found


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stopped_run_goes_on_as_the_whole_one(
    layout: str, tikmix: dict[str, Any], tmp_path: Path
) -> None:
    ranks, arguments, stop = LAYOUTS[layout]
    whole = steps(megatron(ranks, tmp_path / "whole", tikmix, *arguments.split()))
    first = megatron(
        ranks, tmp_path / "parts", tikmix, *arguments.split(), "--exit-interval", str(stop)
    )
    second = megatron(ranks, tmp_path / "parts", tikmix, *arguments.split())
    parts = steps(first, second)
    assert whole.keys() == parts.keys() == set(range(1, 17))
    # Megatron's second logged loss after any start is a mean of two; its gradient norm is not.
    assert parts[stop + 2][1] == whole[stop + 2][1]
    assert {i: row for i, row in parts.items() if i != stop + 2} == {
        i: row for i, row in whole.items() if i != stop + 2
    }
    ledgers = [
        without_timings(read_rows(str(tmp_path / name / "tikmix"), "mixture.jsonl"))
        for name in ("whole", "parts")
    ]
    assert ledgers[0] == ledgers[1]
    assert [row["start_iteration"] for row in ledgers[0]] == [0, 4, 8, 12]
    assert ledgers[0][1]["source"] == "tikmix_d"
    assert "TiKMiX at iteration 4: tikmix_d" in first.stdout


def test_interleaved_stages_read_the_same_samples(tikmix: dict[str, Any], tmp_path: Path) -> None:
    """Not saved: megatron-core 0.19 cannot save this layout, with or without TiKMiX."""
    rows = {}
    for stages in ((), ("--num-layers-per-virtual-pipeline-stage", "1")):
        save = tmp_path / f"run{len(stages)}"
        result = megatron(2, save, tikmix, "--pipeline-model-parallel-size", "2", *stages)
        assert len(logged(result)) == 16, result.stderr[-2000:]
        rows[len(stages)] = read_rows(str(save / "tikmix"), "mixture.jsonl")
    for row, other in zip(*rows.values(), strict=True):
        assert row["domain_samples"].keys() == other["domain_samples"].keys()
        assert row["start_sample"] == other["start_sample"]
    assert len(rows[0]) == 4


def test_without_the_argument_nothing_changes(tikmix: dict[str, Any], tmp_path: Path) -> None:
    """The launcher alone leaves Megatron's own data, here mock data, and its checkpoints as are."""
    result = megatron(1, tmp_path / "plain", None, "--mock-data", "--exit-interval", "6")
    assert len(steps(result)) == 6
    assert not (tmp_path / "plain" / "tikmix").exists()
    assert "TiKMiX" not in result.stdout
    # A run that began so is not gone on with as if it had not.
    refused = megatron(1, tmp_path / "plain", tikmix)
    assert refused.returncode != 0
    assert "was saved without TiKMiX" in refused.stderr


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"data": {"manifest": "none.yaml"}}, [], "none.yaml"),
        ({"train": {"train_iters": 4}}, [], "train.train_iters follows from the loop's arguments"),
        ({"remix": {"interval_sample": 4}}, [], "interval_sample"),
        ({}, ["--fim-data"], "--fim-data is not supported"),
    ],
)
def test_refusals(
    changes: dict[str, Any],
    arguments: list[str],
    words: str,
    tikmix: dict[str, Any],
    tmp_path: Path,
) -> None:
    merged = {**tikmix, **{key: {**tikmix.get(key, {}), **value} for key, value in changes.items()}}
    result = megatron(1, tmp_path / "run", merged, *arguments)
    assert result.returncode != 0
    assert words in result.stderr
    assert not steps_logged(result)


def steps_logged(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"iteration +\d+/", result.stdout)
