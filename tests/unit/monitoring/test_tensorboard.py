"""Event files read back: every number of the rows is there, at its iteration, and no other."""

import numpy as np
import pytest
from make_run import make_run

from megatron_tikmix.monitoring.tensorboard import TensorBoardWriter

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read_back(log_dir):
    events = event_accumulator.EventAccumulator(
        str(log_dir), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    scalars = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    assert len(scalars) == sum(len(events.Scalars(tag)) for tag in events.Tags()["scalars"])
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("mixture/decision/text_summary")
    }
    return scalars, texts


def expected_scalars(ledger, metrics, realised):
    expected = {}

    def put(prefix, values, step):
        expected.update({(f"{prefix}/{name}", step): value for name, value in values.items()})

    for row in ledger:
        step = row["start_iteration"]
        put("mixture/weight", row["weights"], step)
        put("mixture/epochs", row["domain_epochs"], step)
        put("validation/loss", row["task_loss"], step)
        expected["mixture/effective_domains", step] = row["effective_domains"]
        if row["influence"]:
            expected["mixture/total_variation", step] = row["total_variation"]
            expected["mixture/total_variation_noise", step] = row["total_variation_noise"]
            expected["solver/duality_gap", step] = row["solution"]["certificate"]["gap"]
            found = row["audit"]["overall"]
            put("audit", {name: found[name] for name in ("difference", "low", "high")}, step)
            for task in row["influence"]:
                put(f"influence/{task}", row["influence"][task], step)
                put(f"influence_se/{task}", row["influence_se"][task], step)
        for field, values in (row["rank_stability"] or {}).items():
            put(f"rank_stability/{field}", values, step)
    for row in metrics:
        step = row["iteration"]
        expected["lm loss", step] = row["lm_loss"]
        expected["learning-rate", step] = row["learning_rate"]
        expected["grad-norm", step] = row["grad_norm"]
        expected["tokens-per-second", step] = row["tokens_per_second"]
        put("domain_loss", row["domain_loss"], step)
        put("mixture/realised", realised, step)
        put("validation/loss", row.get("task_loss", {}), step)
    return expected


def write(log_dir, ledger, metrics, realised, purge_step=None):
    with TensorBoardWriter(log_dir, purge_step=purge_step) as writer:
        former = None
        for stage in ledger:
            writer.stage(stage, former)
            former = stage
            end = stage["start_iteration"] + 120
            for row in metrics:
                if stage["start_iteration"] < row["iteration"] <= end:
                    writer.step(row, realised)


@pytest.mark.parametrize("domains", [["web/en", "code", "a b"], [f"d{i}" for i in range(50)]])
def test_every_value_comes_back(tmp_path, domains):
    ledger, metrics = make_run(tmp_path / "run", domains, ["t", "u/v"], stages=3, seed=5)
    realised = {name: 1 / len(domains) for name in domains}
    write(tmp_path / "tb", ledger, metrics, realised)
    scalars, texts = read_back(tmp_path / "tb")
    expected = expected_scalars(ledger, metrics, realised)
    assert scalars.keys() == expected.keys()
    for key, value in expected.items():
        assert scalars[key] == np.float32(value), key
    assert list(texts) == [0, 120, 240]
    assert texts[120].startswith("tikmix_d: the change is 3.1 times its noise. Total variation ")
    assert f"{ledger[1]['total_variation']:.3f} (noise 0.021)" in texts[120]
    assert "Largest moves: " in texts[120]
    assert "The audit's rollouts are as predicted. Audit: 48.0 k tokens in 2.0 s." in texts[120]
    assert "Largest moves: " not in texts[0]


def test_what_is_not_known_is_not_written(tmp_path):
    ledger, metrics = make_run(tmp_path / "run", ["a", "b"], ["t"], stages=2, seed=5)
    metrics[0]["grad_norm"] = None
    ledger[1]["influence"]["t"]["b"] = None
    write(tmp_path / "tb", ledger, metrics, {})
    scalars, _ = read_back(tmp_path / "tb")
    assert ("influence/t/a", 120) in scalars
    assert ("influence/t/b", 120) not in scalars
    assert ("grad-norm", 10) not in scalars
    assert ("grad-norm", 20) in scalars


def test_a_resumed_run_hides_what_was_beyond_its_checkpoint(tmp_path):
    ledger, metrics = make_run(tmp_path / "run", ["a", "b"], ["t"], stages=2, seed=5)
    write(tmp_path / "tb", ledger[:1], metrics[:10], {})
    again = [{**row, "lm_loss": row["lm_loss"] + 1} for row in metrics[5:8]]
    with TensorBoardWriter(tmp_path / "tb", purge_step=metrics[4]["iteration"] + 1) as writer:
        for row in again:
            writer.step(row, {})
    scalars, _ = read_back(tmp_path / "tb")
    seen = {step: value for (tag, step), value in scalars.items() if tag == "lm loss"}
    wanted = {row["iteration"]: np.float32(row["lm_loss"]) for row in [*metrics[:5], *again]}
    assert seen == wanted
