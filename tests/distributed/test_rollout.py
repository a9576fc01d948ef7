"""Rollouts on two ranks: exact restoration, the numbers of one rank, and no hang."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT, overridden
from tests.rollout_runs import DROPOUT, THREE, candidates, job, rollouts_of, trained

LAYOUTS: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "data parallel, bf16, dropout": {**DROPOUT, "model.bf16": True},
    "data parallel, overlapped, dropout": {
        **DROPOUT,
        "ddp.overlap_grad_reduce": True,
        "ddp.overlap_param_gather": True,
    },
    "tensor parallel, bf16, dropout": {
        **DROPOUT,
        "model.bf16": True,
        "model.tensor_model_parallel_size": 2,
    },
    "pipeline parallel, dropout": {**DROPOUT, "model.pipeline_model_parallel_size": 2},
    "interleaved pipeline parallel": {
        "model.pipeline_model_parallel_size": 2,
        "model.virtual_pipeline_model_parallel_size": 2,
    },
}


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    return overridden(settings, {"probe.task_samples": 6})


def workers(
    part: str, settings: list[dict[str, Any]], folder: Path, check: bool = True
) -> tuple[list[Any], subprocess.CompletedProcess[str]]:
    """What each of two ranks wrote, and how the job ended."""
    asked = folder / f"{part}.json"
    asked.write_text(json.dumps({"part": part, "settings": settings, "results": str(folder)}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "-m", "tests.distributed.rollout_worker", str(asked)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        cwd=ROOT,
    )
    if check and result.returncode != 0:
        pytest.fail(f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    files = [folder / f"{rank}.json" for rank in range(2)]
    return [json.loads(file.read_text()) for file in files if file.exists()], result


def test_every_layout_is_restored_and_gives_the_numbers_of_one_rank(
    small: dict[str, Any], tmp_path: Path
) -> None:
    layouts = [overridden(small, overrides) for overrides in LAYOUTS.values()]
    ranks, _ = workers("undisturbed", layouts, tmp_path)
    with job(small) as parallel:
        run = trained(small, parallel)
        one = rollouts_of(run).measure(candidates(run.domains, *THREE), seed=7, iters=2)
    # 3 candidates, 2 steps of 8 samples; 2 tasks of 6 samples, before and three times after.
    assert (one.trained_tokens, one.evaluated_tokens) == (3 * 2 * 8 * 32, 4 * 2 * 6 * 32)
    assert np.abs(one.outcomes_NV).min() > 1e-3
    for rank in ranks:
        for name, seen in zip(LAYOUTS, rank, strict=True):
            assert seen["changed"] == [], name
            expected, losses = seen["losses"]
            assert losses == expected, name
            assert seen["tokens"][0] == one.trained_tokens, name
            if "dropout" not in name:
                np.testing.assert_allclose(
                    seen["outcomes"], one.outcomes_NV, rtol=0, atol=5e-6, err_msg=name
                )
    for name, first, second in zip(LAYOUTS, *ranks, strict=True):
        assert first["outcomes"] == second["outcomes"], name


def test_a_solver_on_rank_0_is_served_whatever_happens(
    small: dict[str, Any], tmp_path: Path
) -> None:
    ((main,), (other,)), _ = workers("served", [overridden(small, DROPOUT)], tmp_path)
    assert main["two probes"]["answer"] == main["direct"]["answer"]
    assert main["no probe"]["answer"] == "nothing asked"
    for name in ("direct", "two probes", "no probe"):
        assert other[name]["answer"] is None
    lost = "the data of a rollout cannot be read: rank 1: OSError: the disk is gone"
    expected = {
        "solver fails": (
            "ArithmeticError: no solution",
            "TrainingError: rank 0: ArithmeticError: no solution",
        ),
        "bad input": ("InputError: remix.gamma is wrong", "InputError: remix.gamma is wrong"),
        "no mixture": ("InputError: rollouts: integer weights", "InputError: rollouts: integer"),
        "data fails on rank 1": (
            f"RolloutError: {lost}",
            f"TrainingError: rank 0: RolloutError: {lost}",
        ),
        "data fails on rank 1, caught": (f"went on without: {lost}", None),
        "a step fails on both": ("went on without: a rollout failed: ValueError: no more", None),
    }
    for name, (on_main, on_other) in expected.items():
        assert main[name]["answer"].startswith(on_main), name
        if on_other is None:
            assert other[name]["answer"] is None, name
        else:
            assert other[name]["answer"].startswith(on_other), name
    audits = main.pop("audit"), other.pop("audit")
    assert [found["verdict"] for found in audits] == ["contradicted", None]
    followed = {"required": 0.333, "not required": 0.0, "forced": 0.0}
    assert [found["weight"] for found in audits] == [followed] * 2
    for name in main:
        assert main[name]["restored"], name
        assert other[name]["restored"], name
        for count in ("rollouts", "tokens"):
            assert main[name][count] == other[name][count], name
    assert main["two probes"]["rollouts"] == 3


def test_a_step_that_fails_on_one_rank_ends_the_job(small: dict[str, Any], tmp_path: Path) -> None:
    """No time is asserted but the launcher's limit: what matters is that nobody waits for ever."""
    results, ended = workers("alone", [small], tmp_path, check=False)
    assert ended.returncode != 0
    assert results == []
    assert "ValueError: only here" in ended.stderr
