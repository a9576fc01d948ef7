"""A proposal at a checkpoint is what the run itself decided there; nothing of it is touched."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.utils import get_blend_from_list

from megatron_tikmix.influence.matrix import InfluenceMatrix
from tests.conftest import overridden, read_rows
from tests.ranks import torchrun, train


def propose(run_dir: Path, *arguments: object, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = ["tools/propose_mixture.py", str(run_dir), *map(str, arguments)]
    return torchrun(command, ranks)


def files(run_dir: Path) -> dict[str, tuple[int, int]]:
    """Every file of the run with its size and time."""
    found = (path for path in run_dir.rglob("*") if path.is_file() and "cache" not in path.parts)
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def largest_error(row: dict[str, Any], reference: dict[str, Any]) -> float:
    """Of the values and errors of a matrix, over each reference row's largest entry."""
    ours, theirs = InfluenceMatrix.from_json(row), InfluenceMatrix.from_json(reference)
    assert (ours.tasks, ours.domains) == (theirs.tasks, theirs.domains)
    assert ours.standard_error_VD is not None
    assert theirs.standard_error_VD is not None
    apart_VD = np.abs(ours.values_VD - theirs.values_VD)
    errors_VD = np.abs(ours.standard_error_VD - theirs.standard_error_VD)
    return float((np.maximum(apart_VD, errors_VD) / theirs.scale_V[:, None]).max())


def test_a_proposal_is_what_the_run_decided_there(settings: dict[str, Any]) -> None:
    """At the checkpoints of both boundaries, dropout on; the second one on two ranks."""
    settings = overridden(settings, {"model.hidden_dropout": 0.1, "checkpoint.keep": 10})
    train(settings)
    run_dir = Path(settings["run_dir"])
    ledger = read_rows(run_dir, "mixture.jsonl")
    before = files(run_dir)
    out = run_dir.with_name("proposal.json")
    for stage, ranks, most in ((1, 1, 1e-5), (2, 2, 1e-4)):
        result = propose(run_dir, "--iteration", 4 * stage, "--json", out, ranks=ranks)
        assert result.returncode == 0, result.stderr
        told, row = json.loads(out.read_text()), ledger[stage]
        assert (told["stage"], told["start_iteration"]) == (stage, 4 * stage)
        assert largest_error(told, row) < most
        assert told["weights_before"] == ledger[stage - 1]["weights"]
        assert told["source"] == row["source"]
        assert told["weights"] == pytest.approx(row["weights"], abs=1e-5 if ranks == 1 else 1e-3)
        assert told["probe_tokens"] > 0
    # What Megatron reads on its command line.
    option, *blend = result.stdout.split()
    assert option == "--data-path"
    prefixes, weights = get_blend_from_list(blend)
    assert blend == told["data_path"]
    positive = {name: weight for name, weight in told["weights"].items() if weight > 0}
    assert weights == list(positive.values())
    assert [Path(prefix).name for prefix in prefixes] == [f"{name}_train" for name in positive]
    assert all(Path(f"{prefix}.idx").is_file() for prefix in prefixes)
    assert files(run_dir) == before


def test_other_tasks_and_domains_on_the_model_of_a_static_run(settings: dict[str, Any]) -> None:
    """What was trained on `low` and `high` alone is asked about `junk`, for one task."""
    settings = overridden(
        settings,
        {
            "remix": {"policy": "static"},
            "data.domains": ["low", "high"],
            "train.train_iters": 4,
        },
    )
    train(settings)
    run_dir = Path(settings["run_dir"])
    out = run_dir.with_name("proposal.json")
    more = ["--data.domains", "[low, high, junk]", "--tasks", "{only: {domain: high}}"]
    result = propose(run_dir, "--json", out, *more)
    assert result.returncode == 0, result.stderr
    told = json.loads(out.read_text())
    assert set(told["weights"]) == {"low", "high", "junk"}
    assert list(told["influence"]) == ["only"]
    assert told["weights_before"] == pytest.approx(dict.fromkeys(told["weights"], 1 / 3))
    for arguments, words in (
        (["--iteration", 3], "has no checkpoint of iteration 3; it has 4"),
        (["--model.num_layers", 2], "was saved with model.num_layers 4, and"),
        (["--model.num_leyers", 2], "did you mean model.num_layers?"),
    ):
        refused = propose(run_dir, *arguments)
        assert refused.returncode == 2
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    nothing = propose(run_dir.with_name("nowhere"))
    assert nothing.returncode == 2
    assert "has no config.yaml; give the run_dir of a run" in nothing.stderr
