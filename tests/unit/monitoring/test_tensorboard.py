"""Event files read back: every number of the rows is there, at its iteration, and no other."""

import io
import re

import numpy as np
import pytest
from make_run import make_run
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from megatron_tikmix.monitoring.decision import Influence
from megatron_tikmix.monitoring.heat_map_image import cell_height, heat_map_image
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
        expected["validation/mean_loss", step] = np.mean(list(row["task_loss"].values()))
        put("mixture/tokens", {n: 128 * c for n, c in row["domain_samples"].items()}, step)
        expected["mixture/effective_domains", step] = row["effective_domains"]
        if row["influence"]:
            expected["mixture/total_variation", step] = row["total_variation"]
            expected["mixture/total_variation_noise", step] = row["total_variation_noise"]
            expected["solver/duality_gap", step] = row["solution"]["certificate"]["gap"]
            put("audit", row["audit"]["overall"], step)
            expected["probe/share_of_tokens", step] = 98304 / (98304 + 120 * 16 * 128)
            expected["probe/seconds", step] = 3.2
            gains = row["solution"]["gain_after"]
            put("predicted_gain", {task: gains[task] - 0.25 for task in gains}, step)
            for task in row["influence"]:
                put(f"influence/{task}", row["influence"][task], step)
                put(f"influence_se/{task}", row["influence_se"][task], step)
                for name, value in row["influence"][task].items():
                    error = row["influence_se"][task][name]
                    expected[f"influence_low/{task}/{name}", step] = value - error
                    expected[f"influence_high/{task}/{name}", step] = value + error
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
        if "task_loss" in row:
            expected["validation/mean_loss", step] = np.mean(list(row["task_loss"].values()))
    return expected


def write(log_dir, ledger, metrics, realised, purge_step=None):
    with TensorBoardWriter(log_dir, purge_step=purge_step, sequence_length=128) as writer:
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


def accumulated(log_dir):
    events = event_accumulator.EventAccumulator(
        str(log_dir), size_guidance={"tensors": 0, "images": 0}
    )
    events.Reload()
    return events


def test_the_charts_name_tags_that_are_written(tmp_path):
    """Every chart of the layout has data, and target and realised weights share one."""
    domains, tasks = ["web.en", "code"], ["t", "u"]
    ledger, metrics = make_run(tmp_path / "run", domains, tasks, stages=3, seed=5)
    write(tmp_path / "tb", ledger, metrics, dict.fromkeys(domains, 0.5))
    events = accumulated(tmp_path / "tb")
    (config,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(config.tensor_proto.string_val[0])
    tags = set(events.Tags()["scalars"])
    shown = {}
    for category in layout.category:
        for chart in category.chart:
            drawn = {t for p in chart.multiline.tag for t in tags if re.search(p, t)}
            for series in chart.margin.series:
                assert {series.value, series.lower, series.upper} <= tags, chart.title
                drawn.add(series.value)
            assert drawn, f"{chart.title} shows nothing"
            shown[category.title, chart.title] = drawn
    weights = {f"mixture/{of}/{name}" for of in ("weight", "realised") for name in domains}
    assert shown["mixture", "target (steps) and realised weights"] == weights
    of_code = {"mixture/weight/code", "mixture/realised/code"}
    assert shown["target and realised, by domain", "code"] == of_code
    assert shown["influence (± one standard error)", "u"] == {f"influence/u/{n}" for n in domains}
    unseen = tags - set().union(*shown.values())
    edges = {tag for tag in tags if tag.startswith(("influence_", "audit/low", "audit/high"))}
    others = {"learning-rate", "grad-norm", "tokens-per-second", "probe/seconds"}
    assert unseen - edges == others


def test_the_heat_map_shows_the_matrix(tmp_path):
    """Colours at the middle of each cell: grey within noise, else by sign and size."""
    domains, tasks = ["a", "b", "c", "d", "e"], ["t", "u"]
    ledger, metrics = make_run(tmp_path / "run", domains, tasks, stages=2, seed=5)
    ledger[1]["influence"]["t"] = {"a": 4.0, "b": -4.0, "c": 2.0, "d": 0.5, "e": -2.0}
    ledger[1]["influence_se"]["t"] = {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.3, "e": None}
    write(tmp_path / "tb", ledger, metrics, {})
    (image,) = accumulated(tmp_path / "tb").Images("influence/heat_map")
    assert image.step == 120
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    drawn, (x, y) = heat_map_image(Influence.of(ledger[1]))
    np.testing.assert_array_equal(pixels, drawn)
    # Near a cell's corner, where no number is written.
    cells = [tuple(pixels[y + d * cell_height(5) + 2, x + 2].tolist()) for d in range(5)]
    grey = (0xE6, 0xE8, 0xEC)
    assert cells[3] == cells[4] == grey
    assert cells[0] == (0x1F, 0x5F, 0x9E)
    assert cells[1] == (0xB2, 0x56, 0x2B)
    assert cells[2] == (0x7F, 0xB0, 0xD8)


def test_hparams_come_back(tmp_path):
    config = {
        "seed": 7,
        "run_dir": "not compared",
        "remix": {"policy": "tikmix_d", "constraints": {"pareto": True, "upper": [1, 2]}},
        "train": {"train_iters": 12, "rampup_batch_size": None},
    }
    with TensorBoardWriter(tmp_path / "tb") as writer:
        writer.hparams(config)
    content = accumulated(tmp_path / "tb").summary_metadata["_hparams_/session_start_info"]
    data = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
    found = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in data.session_start_info.hparams.items()
    }
    assert found == {
        "seed": 7,
        "remix.policy": "tikmix_d",
        "remix.constraints.pareto": True,
        "remix.constraints.upper": "[1, 2]",
        "train.train_iters": 12,
    }
