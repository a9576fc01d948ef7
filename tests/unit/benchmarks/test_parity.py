"""What benchmarks/parity.py calls equal, on runs made by hand."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from parity_parts import layouts
from parity_parts.start import BOUNDARIES, START, STEPS, Settings, configured

from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank


def found() -> dict[str, Any]:
    """What the two launches of a layout leave."""
    generator = np.random.default_rng(0)
    rows = [
        {"iteration": i, "lm_loss": 5.0 - i / 100, "grad_norm": 1.0}
        for i in range(1, START + STEPS + 1)
    ]
    banks = [
        SubBatchBank(
            generator.normal(size=(3, 8, 2)), np.full((3, 8), 32.0), list("abc"), list("xy")
        )
        for _ in BOUNDARIES
    ]
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    stages = [{"weights": weights, "bank": bank and bank.to_json()} for bank in (None, *banks)]
    read = {index: (index % 3, f"hash {index}") for index in range(5)}
    run = {"own": rows, "ledger": rows, "stages": stages, "samples": read, "seconds": [1.0, 1.0]}
    return copy.deepcopy(run)


def verdict(run: dict[str, Any]) -> list[str]:
    return layouts.missed({"tp2": {"ranks": 2, **layouts.compared(run, found())}})


def test_equal_runs_are_equal_and_each_difference_is_named() -> None:
    assert verdict(found()) == []
    run = found()
    run["ledger"][START]["lm_loss"] *= 1 + 2e-5
    assert verdict(run) == ["tp2: loss, relative differs by 2.0e-05; the target is 1e-05"]
    run = found()
    run["ledger"][START - 1]["lm_loss"] *= 2  # the start's own rows are not compared
    assert verdict(run) == []
    run = found()
    run["ledger"][-1]["lm_loss"] = float("nan")
    assert "loss" in verdict(run)[0]
    run = found()
    run["stages"][-1]["weights"] = {"a": 0.502, "b": 0.248, "c": 0.25}
    assert verdict(run) == ["tp2: mixture differs by 2.0e-03; the target is 1e-03"]
    run = found()
    run["samples"][3] = (1, "hash 3")
    assert verdict(run) == ["tp2: its samples are not the reference's"]


def test_influence_is_held_against_the_largest_of_its_row() -> None:
    run = found()
    bank = SubBatchBank.from_json(run["stages"][2]["bank"])
    values_VD = bank.influence_matrix().values_VD
    largest = float(np.abs(values_VD[1]).max())
    shift = 3e-4 * largest * bank.tokens_DB[0].sum() / bank.tokens_DB.shape[1]
    bank.sums_DBV[0, :, 1] += shift
    run["stages"][2]["bank"] = bank.to_json()
    assert verdict(run) == [
        "tp2: influence, of the row's largest differs by 3.0e-04; the target is 1e-04"
    ]


def test_a_run_without_its_boundaries_is_no_parity() -> None:
    run = found()
    run["stages"] = run["stages"][:2]
    with pytest.raises((InputError, ValueError)):
        layouts.compared(run, found())


def test_samples_of_all_ranks_are_put_together(tmp_path: Path) -> None:
    for rank, lines in enumerate(([[0, 1, "x"], [1, 0, "y"]], [[1, 0, "y"], [2, 2, "z"]])):
        text = "\n".join(json.dumps(line) for line in lines)
        (tmp_path / f"{rank}.jsonl").write_text(text)
    assert layouts.samples(tmp_path) == {0: (1, "x"), 1: (0, "y"), 2: (2, "z")}
    (tmp_path / "2.jsonl").write_text(json.dumps([2, 2, "other"]))
    with pytest.raises(InputError, match="index 2"):
        layouts.samples(tmp_path)


def test_there_are_the_layouts_of_the_issue() -> None:
    assert len(layouts.LAYOUTS) >= 14
    assert max(ranks for ranks, _ in layouts.LAYOUTS.values()) == 8
    settings = Settings(Path("work"))
    config = configured(settings, "x", layouts.LAYOUTS["tp2-pp2-dp2-sp"][1])
    assert config["model"]["sequence_parallel"]
    assert config["train"]["train_iters"] == START + STEPS
