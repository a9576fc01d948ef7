"""What is derived from a run's files, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import yaml

from megatron_tikmix.jsonl import append_jsonl
from megatron_tikmix.monitoring.files import RunFiles
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.words import DASH, Influence, clean, count, duration, moves, shorten
from tests.make_run import make_run, row_of


@pytest.fixture
def small(tmp_path):
    """Two stages of 10 iterations of 4 samples, the second one open and half done."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"sequence_length": 100}}))
    for row in [
        _stage(0, {"a": 0.5, "b": 0.5}, {"a": 0, "b": 0}, {"a": 0, "b": 0}, 0, 0.0),
        _stage(1, {"a": 0.25, "b": 0.75}, {"a": 18, "b": 22}, {"a": 1.8, "b": 0.11}, 2000, 5.0),
    ]:
        append_jsonl(tmp_path / "mixture.jsonl", row)
    for iteration, speed in [(5, 100.0), (10, 200.0), (15, 400.0)]:
        row = {
            "iteration": iteration,
            "consumed_samples": 4 * iteration,
            "tokens_per_second": speed,
        }
        append_jsonl(tmp_path / "metrics.jsonl", row)
    return RunHistory(RunFiles(tmp_path))


def _stage(stage, weights, samples, epochs, probe_tokens, probe_seconds):
    return {
        "stage": stage,
        "start_iteration": 10 * stage,
        "start_sample": 40 * stage,
        "weights": weights,
        "domain_samples": samples,
        "domain_epochs": epochs,
        "task_loss": {"t": 4.0 - stage, "u": 2.0},
        "probe_tokens": probe_tokens,
        "probe_seconds": probe_seconds,
    }


def test_samples_and_epochs_of_each_stage(small):
    assert small.domains == ["b", "a"]  # by last weight
    assert small.edges == [0, 10, 15]
    np.testing.assert_allclose(small.samples_KD, [[22, 18], [15, 5]])
    np.testing.assert_allclose(small.realised_KD[0], [0.55, 0.45])
    np.testing.assert_allclose(small.realised_KD[1], [0.75, 0.25])
    np.testing.assert_allclose(small.epochs_KD, [[0.11, 1.8], [0.075, 0.5]])


def test_samples_of_the_open_stage_are_those_that_the_metrics_count(small, tmp_path):
    counted = {"iteration": 20, "consumed_samples": 80, "domain_samples": {"a": 30, "b": 50}}
    append_jsonl(tmp_path / "metrics.jsonl", counted)
    history = RunHistory(RunFiles(tmp_path))
    np.testing.assert_array_equal(history.samples_KD, [[22, 18], [28, 12]])
    np.testing.assert_allclose(history.realised_KD[1], [0.7, 0.3])
    np.testing.assert_allclose(history.epochs_KD[1], [28 * 0.11 / 22, 1.2])


def test_nothing_is_realised_where_nothing_was_drawn(tmp_path):
    append_jsonl(tmp_path / "mixture.jsonl", _stage(0, {"a": 1.0}, {"a": 0}, {"a": 0}, 0, 0.0))
    history = RunHistory(RunFiles(tmp_path))
    assert np.isnan(history.realised_KD).all()
    assert np.isnan(history.epochs_KD).all()


def test_caps_on_epochs_are_those_of_the_configuration(small):
    assert small.epoch_caps_D.tolist() == [np.inf, np.inf]
    small.config["remix"] = {"constraints": {"max_epochs": {"a": 2.0}}}
    assert small.epoch_caps_D.tolist() == [np.inf, 2.0]  # b, a
    small.config["remix"] = {"constraints": {"max_epochs": 4}}
    assert small.epoch_caps_D.tolist() == [4.0, 4.0]


def test_what_the_probe_cost(small):
    assert small.probe_token_share == pytest.approx(2000 / (2000 + 60 * 100))
    training = 2000 / 100 + 2000 / 200 + 2000 / 400
    assert small.probe_time_share == pytest.approx(5 / (5 + training))


def test_task_losses_and_their_mean(small):
    assert small.task_losses == {0: {"t": 4.0, "u": 2.0}, 10: {"t": 3.0, "u": 2.0}}
    assert small.mean_task_loss == {0: 3.0, 10: 2.5}


def test_stages_account_for_every_sample(tmp_path):
    _, metrics = make_run(tmp_path, [f"d{i}" for i in range(7)], ["t"], stages=4, seed=3)
    history = RunHistory(RunFiles(tmp_path))
    assert history.samples_KD.sum() == pytest.approx(metrics[-1]["consumed_samples"])
    assert history.samples_KD.shape == (4, 7)
    assert [row.stage for row, _ in history.measured] == [1, 2, 3]
    assert history.task_losses[metrics[-1]["iteration"]] == metrics[-1]["task_loss"]


def test_influence_relative_to_each_task_and_what_is_noise():
    row = {
        "weights": {"a": 0.5, "b": 0.5},
        "influence": {"t": {"a": 4e-5, "b": -8e-5}, "u": {"a": 0.0, "b": 0.0}},
        "influence_se": {"t": {"a": 2.1e-5, "b": 2e-5}, "u": {"a": 0.1, "b": None}},
    }
    influence = Influence.of(row_of(row))
    relative = influence.relative()
    np.testing.assert_allclose(relative.values_VD, [[0.5, -1.0], [0.0, 0.0]])
    np.testing.assert_allclose(relative.errors_VD[0], [0.2625, 0.25])
    assert influence.is_noise().tolist() == [[True, False], [True, True]]
    mean_D, error_D = relative.mean()
    np.testing.assert_allclose(mean_D, [0.25, -0.5])
    assert error_D[0] == pytest.approx((0.2625 + 0.1) / 2)
    assert Influence.of(row_of({"weights": {"a": 1.0}, "influence": None})) is None


def test_a_domain_the_row_does_not_hold_is_unknown():
    row = {"weights": {"a": 1.0}, "influence": {"t": {"a": 1.0}}, "influence_se": {"t": {"a": 0.1}}}
    influence = Influence.of(row_of(row), ["new", "a"])
    assert math.isnan(influence.values_VD[0, 0])
    assert influence.is_noise().tolist() == [[True, False]]


def test_moves_are_sorted_by_size_and_cover_both_mixtures():
    found = moves({"a": 0.5, "b": 0.3, "gone": 0.2}, {"a": 0.45, "b": 0.3, "new": 0.25})
    assert [move.domain for move in found] == ["new", "gone", "a", "b"]
    assert found[1].change == -0.2


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (512, "512"), (999.6, "1.00 k"), (98304, "98.3 k"), (5e15, "5e+03 T"), (None, DASH)],
)
def test_counts(value, words):
    assert count(value).replace("5.00e+03", "5e+03") == words


def test_durations_and_names():
    assert duration(80) == "1:20"
    assert duration(7389.6) == "2:03:10"
    assert clean("a\x1b[31m\nb") == "a�[31m b"
    assert shorten("abcdefghij", 7) == "abcd…ij"
    assert shorten("abc", 3) == "abc"
