"""report.html: well formed, self-contained, escaped, and its numbers are the ledger's."""

import json
import os
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_tikmix.errors import InputError
from megatron_tikmix.monitoring import figures
from megatron_tikmix.monitoring.answers import why
from megatron_tikmix.monitoring.files import RunFiles
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.report import write_report
from megatron_tikmix.monitoring.words import DASH, count, duration
from tests.make_run import SEQUENCE_LENGTH, make_run

SIX = ["prose", "python", "licences", "man_pages", "c_headers", "noise"]
PICTURES = ["weights", "influence", "losses", "consumption"]
MINUS = "\N{MINUS SIGN}"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The page as a reader gets it: open elements must close in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.links, self.plots, self.scripts = [], [], [], []
        self.tables, self.text = {}, []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.links += [attrs[key] for key in ("src", "href", "action", "data") if key in attrs]
        if "plotly-graph-div" in attrs.get("class", ""):
            self.plots.append(attrs["id"])
        if tag == "table":
            self.rows = self.tables[attrs["id"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] in (["td"], ["th"]):
            self.rows[-1][-1] += data
        else:
            self.text.append(data)


def report_of(path, domains=SIX, tasks=("prose", "python"), stages=4, seed=0):
    ledger, metrics = make_run(path, domains, tasks, stages, seed)
    return Page(write_report(path)), ledger, metrics


def history_of(path):
    return RunHistory(RunFiles(path))


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    page, _, _ = report_of(tmp_path)
    assert page.plots == PICTURES
    assert sum(script.count("Plotly.newPlot(") for script in page.scripts[1:]) == 4
    assert page.links == []
    style = (tmp_path / "report.html").read_text(encoding="utf-8").partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    assert os.listdir(tmp_path).count("report.html") == 1
    assert [name for name in os.listdir(tmp_path) if name.startswith("report.html.")] == []


def test_the_mixture_table_holds_the_ledgers_numbers(tmp_path):
    page, ledger, metrics = report_of(tmp_path)
    head, *rows = page.tables["mixture"]
    assert head == ["domain", "first weight", "last weight", "tokens", "epochs", "mean influence"]
    first, last = ledger[0]["weights"], ledger[-1]["weights"]
    assert [row[0] for row in rows] == sorted(last, key=lambda name: -last[name])
    for name, before, after, tokens, epochs, influence in rows:
        assert before == f"{100 * first[name]:.2f} %"
        assert after == f"{100 * last[name]:.2f} %"
        samples = metrics[-1]["domain_samples"][name]
        assert tokens == count(samples * SEQUENCE_LENGTH)
        size = ledger[-1]["domain_samples"][name] / ledger[-1]["domain_epochs"][name]
        assert epochs == f"{samples / size:.3f}"
        relative = [
            np.array([values[name], errors[name]]) / max(map(abs, values.values()))
            for values, errors in zip(
                ledger[-1]["influence"].values(), ledger[-1]["influence_se"].values(), strict=True
            )
        ]
        value, error = np.mean(relative, axis=0)
        assert influence == f"{value:+.2f} ± {error:.2f}".replace("-", MINUS)


def test_the_boundary_table_says_what_changed_and_why(tmp_path):
    page, ledger, _ = report_of(tmp_path)
    _, *rows = page.tables["boundaries"]
    assert len(rows) == len(ledger)
    assert rows[0][5] == DASH
    for former, stage, row in zip(ledger, ledger[1:], rows[1:], strict=False):
        assert row[:3] == [str(stage["stage"]), str(stage["start_iteration"]), stage["source"]]
        assert row[3] == stage["reason"] + "."
        assert row[4] == f"{stage['total_variation']:.3f} (noise 0.021)"
        change = {name: w - former["weights"][name] for name, w in stage["weights"].items()}
        largest = sorted(change, key=lambda name: -abs(change[name]))[:3]
        assert [move.split(" ")[0] for move in row[5].split("; ")] == largest
        assert row[6] == f"{stage['probe_seconds']:.1f}"


def test_the_summary_says_the_same_as_the_history(tmp_path):
    page, ledger, metrics = report_of(tmp_path)
    text = " ".join(page.text)
    assert "A GPT of 4 layers and hidden size 128, trained for 480 of 480 iterations." in text
    first, last = (np.mean(list(row["task_loss"].values())) for row in (ledger[0], metrics[-1]))
    assert f"{first:.3f} (iteration 0) to {last:.3f} (iteration 480)" in text
    probe = sum(row["probe_tokens"] for row in ledger)
    trained = metrics[-1]["consumed_samples"] * SEQUENCE_LENGTH
    assert f"{100 * probe / (probe + trained):.1f}\N{NO-BREAK SPACE}% of all tokens" in text


def test_the_cost_table_adds_up(tmp_path):
    page, ledger, metrics = report_of(tmp_path)
    head, *rows = page.tables["cost"]
    assert head == ["", "tokens", "compute, of training's", "time", "time, of training's"]
    trained = metrics[-1]["consumed_samples"] * SEQUENCE_LENGTH
    parts = [row for row in ledger if row["audit"]]
    seconds = sum(10 * 16 * SEQUENCE_LENGTH / row["tokens_per_second"] for row in metrics)
    expected = {"training": (trained, trained, seconds)}
    probe = sum(row["probe_tokens"] for row in parts)
    expected["probe"] = (probe, probe, 3.2 * len(parts))
    for kind, field in (("rollouts", "rollout"), ("audit", "audit")):
        found = [row[field] for row in parts]
        forward = sum(each["evaluated_tokens"] for each in found)
        both = sum(each["trained_tokens"] for each in found)
        spent = sum(each["seconds"] for each in found)
        expected[kind] = (both + forward, both + forward / 3, spent)
    assert [row[0] for row in rows] == list(expected)
    for kind, tokens, compute, time, share in rows:
        total, weighed, spent = expected[kind]
        assert tokens == count(total)
        assert compute == f"{100 * weighed / trained:.1f} %"
        assert time == duration(spent)
        assert share == f"{100 * spent / seconds:.1f} %"


def test_losses_are_held_against_a_baseline(tmp_path):
    """Asked for, or named by the configuration; the table has the last point in common."""
    _, _, mine = report_of(tmp_path / "run", tasks=["t", "u", "mine"])
    make_run(tmp_path / "other", SIX, ["u", "t"], 3, seed=9)
    theirs = json.loads((tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[-1])
    page = Page(write_report(tmp_path / "run", tmp_path / "other"))
    (at_common,) = (row for row in mine if row["iteration"] == theirs["iteration"] == 360)
    head, *rows, mean = page.tables["baseline-losses"]
    assert head == ["after 737 k tokens", "this run", "baseline", "difference"]
    assert {row[0] for row in rows} == {"t", "u"}
    for task, *cells in rows:
        first, second = theirs["task_loss"][task], at_common["task_loss"][task]
        written = [f"{second:.4f}", f"{first:.4f}", f"{second - first:+.4f}"]
        assert cells == [text.replace("-", MINUS) for text in written]
    assert mean[0] == "mean over tasks"
    assert "baseline" in page.plots

    config = tmp_path / "run" / "config.yaml"
    config.write_text(f"{config.read_text()}baseline: {tmp_path / 'other'}\n")
    assert Page(write_report(tmp_path / "run")).tables["baseline-losses"] == [head, *rows, mean]
    shutil.rmtree(tmp_path / "other")
    page = Page(write_report(tmp_path / "run"))  # while a run ends, that is no reason to fail
    assert "baseline" not in page.plots
    assert any("other is not a directory" in words for words in page.text)
    with pytest.raises(InputError, match="other is not a directory"):
        write_report(tmp_path / "run", tmp_path / "other")


def test_versions_settings_and_caps_are_on_the_page(tmp_path):
    make_run(tmp_path, SIX, ["t"], 2, seed=0, max_epochs=2.5)
    page = Page(write_report(tmp_path))
    (start,) = page.tables["starts"][1:]
    assert start[2] == "2 = tensor 1 × pipeline 1 × data 2"
    assert start[4] == "python 3.11.2, megatron_tikmix 0.1.0, torch 2.13.0"
    settings = dict(page.tables["settings"][1:])
    assert settings["layers × hidden size"] == "4 / 128"
    assert settings["constraints"] == "max_epochs 2.5"
    assert [row[5] for row in page.tables["mixture"]] == ["cap", *["2.50"] * 6]
    assert any("\n  policy: tikmix_d\n" in words for words in page.text)


def test_what_pushed_is_what_why_says(tmp_path):
    page, ledger, _ = report_of(tmp_path, stages=3)
    history = history_of(tmp_path)
    for row in ledger[1:]:
        head, *rows = page.tables[f"reasons-{row['stage']}"]
        assert head[2:7] == ["gain", "most from", "uniformity", "diversity", "constraints"]
        assert head[7:] == ["all alike", "change", "noise (±)"]
        assert len(rows) == 6
        for cells in rows:
            found = why(history, cells[0], row["stage"])
            gain = sum(found.change.gain.values())
            assert cells[2] == f"{100 * gain:+.2f}".replace("-", MINUS)
            moved = 100 * (found.solved - found.before)
            assert cells[8] == f"{moved:+.2f}".replace("-", MINUS)


def test_pictures_draw_the_ledgers_numbers(tmp_path):
    ledger, metrics = make_run(tmp_path, SIX, ["t", "u"], stages=4, seed=1)
    history = history_of(tmp_path)
    weights = figures.weights_over_time(history)
    for trace in weights.data:
        assert list(trace.y) == pytest.approx([100 * row["weights"][trace.name] for row in ledger])
        assert list(trace.x) == [row["start_iteration"] for row in ledger]
        assert list(trace.width) == [120] * 4
    lines = {trace.name: trace for trace in figures.task_losses(history).data}
    assert list(lines["training (lm loss)"].y) == [row["lm_loss"] for row in metrics]
    assert list(lines["t"].y) == [
        *(row["task_loss"]["t"] for row in ledger),
        metrics[-1]["task_loss"]["t"],
    ]
    assert len(figures.task_losses(history).layout.shapes) == 3  # boundaries
    bars = figures.tokens_and_epochs(history).data
    drawn = sum(np.array(bar.x) for bar in bars if bar.xaxis == "x")
    assert drawn.sum() == pytest.approx(metrics[-1]["consumed_samples"] * SEQUENCE_LENGTH)


def test_heat_maps_grey_out_exactly_what_cannot_be_told_from_zero(tmp_path):
    ledger, _ = make_run(tmp_path, SIX, ["t", "u"], stages=3, seed=1)
    history = history_of(tmp_path)
    figure = figures.influence_maps(history)
    assert [trace.visible for trace in figure.data] == [False, False, True, True]
    assert [step.label for step in figure.layout.sliders[0].steps] == [
        "stage 1, iteration 120",
        "stage 2, iteration 240",
    ]
    grey, coloured = (np.array(trace.z, dtype=float) for trace in figure.data[2:])
    for d, domain in enumerate(history.domains):
        for v, task in enumerate(["t", "u"]):
            values = ledger[2]["influence"][task]
            noise = abs(values[domain]) <= 2 * ledger[2]["influence_se"][task][domain]
            assert np.isnan(coloured[d, v]) == noise
            assert np.isnan(grey[d, v]) != noise
            if not noise:
                relative = values[domain] / max(map(abs, values.values()))
                assert coloured[d, v] == pytest.approx(relative, abs=6e-4)
    assert (np.isnan(coloured).any(), np.isfinite(coloured).any()) == (True, True)
    assert (figure.data[3].zmin, figure.data[3].zmax) == (-1, 1)


def test_two_hundred_domains_keep_a_short_legend_and_every_name(tmp_path):
    domains = [f"a_rather_long_domain_name_number_{i:03d}_of_the_crawl" for i in range(200)]
    page, ledger, _ = report_of(tmp_path, domains, ["t"], stages=3)
    assert {row[0] for row in page.tables["mixture"][1:]} == set(domains)
    history = history_of(tmp_path)
    bars = figures.weights_over_time(history).data
    assert len(bars) == 12
    assert bars[-1].name == "189 others"
    np.testing.assert_allclose(sum(np.array(bar.y) for bar in bars), 100)
    named = {name for name in domains if any(name in bar.hovertext[0] for bar in bars)}
    peak = {name: max(row["weights"][name] for row in ledger) for name in domains}
    assert named == set(sorted(domains, key=lambda name: -peak[name])[:11])
    axis = figures.influence_maps(history).layout.yaxis
    assert list(axis.tickvals) == list(range(200))  # names shortened alike do not share a row


NASTY = ["<b>x</b>", "</script><script>alert(1)</script>", "a & b", '"quoted"', "%{y} $x$"]


def test_names_are_text_wherever_they_appear(tmp_path):
    page, _, _ = report_of(tmp_path, NASTY, NASTY[:2], stages=3)
    assert {row[0] for row in page.tables["mixture"][1:]} == set(NASTY)
    assert len(page.scripts) == 2 + len(PICTURES)  # none was closed early, none was smuggled in
    assert all("<b>x" not in script for script in page.scripts)
    names = {trace.name for trace in figures.weights_over_time(history_of(tmp_path)).data}
    assert "&lt;b&gt;x&lt;/b&gt;" in names


@pytest.mark.parametrize("keep", [[], ["config.yaml"], ["mixture.jsonl"], ["metrics.jsonl"]])
def test_a_run_that_has_hardly_begun_has_a_report_too(tmp_path, keep):
    make_run(tmp_path, SIX, ["t"], stages=1, seed=0)
    for name in {"config.yaml", "mixture.jsonl", "metrics.jsonl"} - set(keep):
        (tmp_path / name).write_text("")
    page = Page(write_report(tmp_path))
    assert ("weights" in page.plots) == (keep == ["mixture.jsonl"])
    assert "influence" not in page.plots
    assert len(page.tables["mixture"]) == (7 if keep == ["mixture.jsonl"] else 1)


def test_a_stage_that_has_only_begun_is_drawn(tmp_path):
    """The report as written at a boundary: the ledger is ahead of the metrics."""
    make_run(tmp_path, SIX, ["t"], stages=3, seed=0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["iteration"] <= 230]
    (tmp_path / "metrics.jsonl").write_text("".join(kept))
    history = history_of(tmp_path)
    assert history.edges == [0, 120, 240, 240]
    assert min(figures.weights_over_time(history).data[0].width) > 0
    assert Page(write_report(tmp_path)).plots == PICTURES


def test_values_that_were_not_finite_leave_gaps(tmp_path):
    ledger, _ = make_run(tmp_path, SIX, ["t", "u"], stages=2, seed=0)
    ledger[1]["influence"]["t"]["noise"] = None
    ledger[1]["influence_se"]["u"]["prose"] = None
    ledger[1]["task_loss"]["t"] = None
    (tmp_path / "mixture.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
    page = Page(write_report(tmp_path))
    assert page.plots == PICTURES
    rows = {row[0]: row for row in page.tables["mixture"]}
    assert rows["noise"][5] == DASH
    assert rows["python"][5] != DASH
