"""A resumed run goes on with the ledger of its checkpoint, whatever became of its bank files."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tikmix.decision.decide import decide_again
from megatron_tikmix.decision.ledger import BankFile, Ledger
from megatron_tikmix.jsonl import read_jsonl
from megatron_tikmix.training.loop import train
from tests.conftest import overridden
from tests.one_rank import one_rank


def trained(settings: dict[str, Any], folder: Path, iterations: int) -> Path:
    settings = overridden(settings, {"train.train_iters": iterations, "remix.smoothing": 0.5})
    with one_rank(settings, folder) as run:
        run.recorder.open_folder()
        run.recorder.begin("", run.state)
        train(run)
        run.recorder.close()
    return Path(settings["run_dir"])


def test_a_checkpoint_names_the_banks_and_does_not_hold_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = trained(settings, tmp_path, 12)
    records = [json.loads(path.read_text()) for path in run_dir.glob("checkpoints/*/tikmix.json")]
    assert records
    for record in records:
        assert record["ledger"] == read_jsonl(run_dir / "mixture.jsonl")[: len(record["ledger"])]
        for row in record["ledger"][1:]:
            assert set(row["bank"]) == {"file", "sha256"}


def test_a_missing_bank_never_costs_the_resume(
    settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = trained(settings, tmp_path, 12)
    lost = Ledger.read(run_dir)[1].measured
    assert isinstance(lost, BankFile)
    (run_dir / lost.name).unlink()
    trained(settings, tmp_path, 20)
    (message,) = {text for text in caplog.messages if "decisions go on without it" in text}
    assert lost.name in message
    ledger = Ledger.read(run_dir)
    assert len(ledger) == 5
    assert decide_again(ledger, 4).mixture == ledger[4].mixture


def test_rows_of_earlier_versions_resume(settings: dict[str, Any], tmp_path: Path) -> None:
    """Their banks are in the rows, in mixture.jsonl and in the checkpoint."""
    run_dir = trained(settings, tmp_path, 12)

    def as_before(row: dict[str, Any]) -> dict[str, Any]:
        bank = row["bank"]
        if bank:
            bank = BankFile(bank["file"], bank["sha256"], run_dir).read().to_json()
        kept = {name: value for name, value in row.items() if name not in ("schema", "rules")}
        return {**kept, "bank": bank}

    rows = [as_before(row) for row in read_jsonl(run_dir / "mixture.jsonl")]
    (run_dir / "mixture.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for path in run_dir.glob("checkpoints/*/tikmix.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "ledger": rows[: len(record["ledger"])]}))
        manifest = path.with_name("manifest.json")
        if manifest.exists():  # which names the size and the hash of each file
            manifest.unlink()
    for path in (run_dir / "banks").iterdir():
        path.unlink()
    trained(settings, tmp_path, 16)
    ledger = Ledger.read(run_dir)
    assert len(ledger) == 4
    assert ledger[1].rules is None
    assert ledger[3].rules is not None
    assert decide_again(ledger, 3).mixture == ledger[3].mixture
