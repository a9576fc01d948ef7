"""``tikmix checkpoint``, over checkpoints whose record is written here by hand."""

import json
from pathlib import Path

import pytest

from megatron_tikmix.cli.main import main
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.training.checkpoint_files import RECORD, CheckpointFolder, sizes_and_digests
from tests.unit.training.test_checkpoint_files import flip_a_bit


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints after 8 and 16 samples; the mixture changed at 8, the second is the latest."""
    schedule = MixtureSchedule(["web", "code"], 8, seed=3)
    ledger = []
    for stage, web in enumerate((0.5, 0.25)):
        schedule.append(8 * stage, Mixture({"web": web, "code": 1 - web}))
        ledger.append({"stage": stage, "start_iteration": stage, "source": "solved"})
        consumed = 8 * (stage + 1)
        record = {
            "iteration": stage + 1,
            "consumed_samples": consumed,
            "skipped_iterations": 0,
            "layout": [2, 1, 4, 1],
            "fingerprint": {"seed": 3},
            "schedule": schedule.to_json(),
            "domain_samples": schedule.domain_counts(consumed).tolist(),
            "ledger": ledger,
        }
        files = CheckpointFolder(tmp_path / "run" / "checkpoints")
        path = files.begin(stage + 1)
        (path / RECORD).write_text(json.dumps(record))
        (path / "__0_0.distcp").write_bytes(b"tensors" * 100)
        files.complete(path, stage + 1, sizes_and_digests(path, [RECORD, "__0_0.distcp"]))
    return tmp_path / "run"


def test_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run_dir), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["latest"] == 2
    rows = [(row["iteration"], row["consumed_samples"]) for row in answer["checkpoints"]]
    assert rows == [(1, 8), (2, 16)]
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert "2 × 1 × 4" in capsys.readouterr().out


def test_verify_names_what_is_damaged(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count(": whole") == 2
    shard = run_dir / "checkpoints" / "iter_0000001" / "__0_0.distcp"
    flip_a_bit(shard)
    assert main(["checkpoint", "verify", str(run_dir)]) == 1
    out = capsys.readouterr().out
    assert f"{shard} does not have the checksum that it was written with" in out
    assert main(["checkpoint", "verify", str(shard.parent), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["whole"]
    assert main(["checkpoint", "verify", str(run_dir / "checkpoints" / "iter_0000002")]) == 0


def test_a_checkpoint_whose_record_is_gone_is_damaged(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = run_dir / "checkpoints" / "iter_0000002"
    (latest / RECORD).unlink()
    for path in (run_dir, latest):
        assert main(["checkpoint", "verify", str(path)]) == 1
        assert f"{latest / RECORD} cannot be read" in capsys.readouterr().out
    assert main(["checkpoint", "list", str(run_dir)]) == 0
    assert f"damaged: {latest}, which latest_checkpointed_iteration.txt names" in (
        capsys.readouterr().out
    )
    (run_dir / "checkpoints" / "iter_0000001" / RECORD).write_text("{")
    assert main(["checkpoint", "list", str(run_dir), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["checkpoints"], len(answer["damaged"])) == ([], 2)


def test_a_run_may_be_named_by_a_number(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("42", "iter_ablation"):
        run_dir = run_dir.rename(run_dir.with_name(name))
        assert main(["checkpoint", "verify", str(run_dir)]) == 0
        assert capsys.readouterr().out.count(": whole") == 2


def test_show(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "checkpoints" / "iter_0000002"
    assert main(["checkpoint", "show", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [stage["weights"] for stage in answer["stages"]] == [
        {"web": 0.5, "code": 0.5},
        {"web": 0.25, "code": 0.75},
    ]
    assert answer["domain_samples"] == {"web": 4 + 2, "code": 4 + 6}
    assert main(["checkpoint", "show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "0.7500" in out
    assert "seed: 3" in out


@pytest.mark.parametrize("command", ["list", "verify", "show"])
def test_what_is_no_checkpoint(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", command, str(tmp_path)]) == 2
    assert "error: " in capsys.readouterr().err
