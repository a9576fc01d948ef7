"""Event files read back: every number of the rows is there, at its iteration, and no other."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from megatron_tikmix.monitoring.tensorboard import TensorBoardWriter, heat_map_image, layout_of
from megatron_tikmix.monitoring.words import Influence
from tests.make_run import make_run, realised, row_of
from tests.tensorboard_values import assert_same, expected_scalars, read_back, undocumented

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def write(log_dir, ledger, metrics, purge_step=None):
    with TensorBoardWriter(log_dir, purge_step=purge_step, sequence_length=128) as writer:
        former = None
        for stage in ledger:
            writer.stage(row_of(stage), former)
            former = row_of(stage)
            end = stage["start_iteration"] + 120
            for row in metrics:
                if stage["start_iteration"] < row["iteration"] <= end:
                    writer.step(row, realised(ledger, row))


@pytest.mark.parametrize("domains", [["web/en", "code", "a b"], [f"d{i}" for i in range(50)]])
def test_every_value_comes_back(tmp_path, domains):
    ledger, metrics = make_run(tmp_path / "run", domains, ["t", "u/v"], stages=3, seed=5)
    write(tmp_path / "tb", ledger, metrics)
    scalars, texts = read_back(tmp_path / "tb")
    assert_same(scalars, expected_scalars(ledger, metrics, length=128))
    assert list(texts) == [0, 120, 240]
    assert texts[120].startswith("tikmix_d: the change is 3.1 times its noise. Total variation ")
    assert f"{ledger[1]['total_variation']:.3f} (noise 0.021)" in texts[120]
    assert "Largest moves: " in texts[120]
    assert "24 rollouts: 59.0 k tokens in 4.0 s." in texts[120]
    assert "+0.0300. Audit: 48.0 k tokens in 2.0 s." in texts[120]
    assert "Largest moves: " not in texts[0]


def test_what_is_not_known_is_not_written(tmp_path):
    ledger, metrics = make_run(tmp_path / "run", ["a", "b"], ["t"], stages=2, seed=5)
    metrics[0]["grad_norm"] = None
    ledger[1]["influence"]["t"]["b"] = None
    write(tmp_path / "tb", ledger, metrics)
    scalars, _ = read_back(tmp_path / "tb")
    assert ("influence/t/a", 120) in scalars
    assert ("influence/t/b", 120) not in scalars
    assert ("grad-norm", 10) not in scalars
    assert ("grad-norm", 20) in scalars


def test_a_resumed_run_hides_what_was_beyond_its_checkpoint(tmp_path):
    ledger, metrics = make_run(tmp_path / "run", ["a", "b"], ["t"], stages=2, seed=5)
    write(tmp_path / "tb", ledger[:1], metrics[:10])
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
    write(tmp_path / "tb", ledger, metrics)
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
    assert shown["mixture", "target and realised weights"] == weights
    of_code = {"mixture/weight/code", "mixture/realised/code"}
    assert shown["target and realised, by domain", "code"] == of_code
    (influence,) = (drawn for (of, _), drawn in shown.items() if of.startswith("influence on u"))
    assert influence == {f"influence/u/{name}" for name in domains}
    unseen = tags - set().union(*shown.values())
    edges = {tag for tag in tags if tag.startswith(("influence_", "audit/"))}
    bytes_of = {f"validation/bits_per_byte/{task}" for task in tasks}
    assert unseen - edges == {"learning-rate", "grad-norm", "solver/seconds"} | bytes_of


def test_the_tags_that_are_written_are_the_documented_ones(tmp_path):
    ledger, metrics = make_run(tmp_path / "run", ["a", "b/c"], ["t"], stages=3, seed=5)
    write(tmp_path / "tb", ledger, metrics)
    tags = accumulated(tmp_path / "tb").Tags()
    texts = {tag.removesuffix("/text_summary") for tag in tags["tensors"]}
    texts.remove("custom_scalars__config__")
    unlisted, unseen = undocumented([*tags["scalars"], *tags["images"], *texts])
    assert (unlisted, unseen) == (set(), set())


def test_many_domains_are_spread_over_charts_that_can_be_read():
    layout = layout_of([f"d{number}" for number in range(200)], ["t"])
    sizes = {
        category.title: [
            len(chart.margin.series) or len(chart.multiline.tag) for chart in category.chart
        ]
        for category in layout.category
    }
    assert sizes["influence on t (± one standard error)"] == [12] * 16 + [8]
    assert sizes["target and realised, by domain"] == [12] * 33 + [4]
    closed = [category.title for category in layout.category if category.closed]
    assert closed == [title for title in sizes if title.startswith("influence") or "by" in title]
    assert sizes["mixture"] == [24, 1, 1, 12, 12]
    assert sizes["tokens, by domain"] == sizes["epochs, by domain"] == [12] * 16 + [8]


def test_what_a_run_never_writes_has_no_chart():
    def titles(**has):
        return [category.title for category in layout_of(["a"], ["t"], **has).category]

    assert "audit" in titles()
    assert "audit" not in titles(audits=False)
    kept = ["mixture", "losses", "cost", "target and realised, by domain"]
    assert titles(decides=False) == kept


def test_the_heat_map_shows_the_matrix(tmp_path):
    """Colours at the middle of each cell: grey within noise, else by sign and size."""
    domains, tasks = ["a", "b", "c", "d", "e"], ["t", "u"]
    ledger, metrics = make_run(tmp_path / "run", domains, tasks, stages=2, seed=5)
    ledger[1]["influence"]["t"] = {"a": 4.0, "b": -4.0, "c": 2.0, "d": 0.5, "e": -2.0}
    ledger[1]["influence_se"]["t"] = {"a": 0.1, "b": 0.1, "c": 0.1, "d": 0.3, "e": None}
    write(tmp_path / "tb", ledger, metrics)
    (image,) = accumulated(tmp_path / "tb").Images("influence/heat_map")
    assert image.step == 120
    pixels = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB"))
    drawn, grid = heat_map_image(Influence.of(row_of(ledger[1])))
    np.testing.assert_array_equal(pixels, drawn)
    # Near a cell's corner, where no number is written.
    corners = [grid.corner(d, 0) for d in range(5)]
    cells = [tuple(pixels[y + 2, x + 2].tolist()) for x, y in corners]
    grey = (0xE6, 0xE8, 0xEC)
    assert cells[3] == cells[4] == grey
    assert cells[0] == (0x1F, 0x5F, 0x9E)
    assert cells[1] == (0xB2, 0x56, 0x2B)
    assert cells[2] == (0x7F, 0xB0, 0xD8)


@pytest.mark.parametrize("times", [2.3, 3.15, 3.9])
def test_signs_survive_being_shrunk_by_leaving_out_pixels(times):
    """As TensorBoard shrinks pictures: the strokes of + and − are still there, in every cell."""
    names = ["a", "b", "c", "d"]
    row = {
        "weights": dict.fromkeys(names, 0.25),
        "influence": {task: dict.fromkeys(names, 0.5) | {"a": 1.0} for task in "tuvw"},
        "influence_se": {task: dict.fromkeys(names, 0.01) for task in "tuvw"},
    }
    signs = {}
    for sign in (1, -1):
        row["influence"] = {
            task: {name: sign * abs(value) for name, value in values.items()}
            for task, values in row["influence"].items()
        }
        pixels, grid = heat_map_image(Influence.of(row_of(row)))
        for d, v in np.ndindex(4, 4):
            x, y = grid.corner(d, v)
            inside = np.s_[y : y + grid.cell_height - grid.gap, x : x + grid.cell_width - grid.gap]
            ink = np.abs(pixels[inside].astype(int) - pixels[y + 1, x + 1]).sum(axis=2) > 150
            columns = np.flatnonzero(ink.any(axis=0))
            ink[:, columns[np.flatnonzero(np.diff(columns) > 1)[0]] + 1 :] = False  # digits
            drawn = np.zeros(pixels.shape[:2], dtype=bool)
            drawn[inside] = ink
            taken = (np.arange(int(size / times)) * times for size in drawn.shape)
            left = drawn[np.ix_(*(places.astype(int) for places in taken))]
            signs[sign, d, v] = int(left.any(axis=1).sum())  # rows with ink: a + is tall
    for d, v in np.ndindex(4, 4):
        assert 1 <= signs[-1, d, v] < signs[1, d, v]


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
