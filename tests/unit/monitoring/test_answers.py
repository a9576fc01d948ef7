"""``tikmix inspect``: terms of a decision against numerical slopes, the rest by hand."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import yaml
from rich.console import Console

from megatron_tikmix.cli.main import main
from megatron_tikmix.decision.rules import Rules
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.jsonl import append_jsonl
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.monitoring.answers import compare, influence, mixture, open_run, summary, why
from megatron_tikmix.monitoring.tables import show_why
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d
from tests.make_run import make_run
from tests.solving import goal_of, limited

DOMAINS, TASKS = ["b", "a", "junk"], ["u", "t"]
VALUES_VD = np.array([[0.3, 2.0, 0.1], [5.0, 1.0, -1.0]])
ERRORS_VD = np.array([[0.2, 0.1, 0.1], [0.5, 0.5, 0.25]])
PRIOR = Mixture({"b": 0.3, "a": 0.3, "junk": 0.4})
SIZES = {"b": 400.0, "a": 100.0, "junk": 200.0}
FREE = limited(max_total_variation=None, pareto=False)
CAPPED = replace(FREE, upper={"a": 0.31})


def run_of_one_decision(
    folder, constraints=FREE, preset=None, gain="log", reference="prior", alpha=0.1
):
    """A run whose second stage was solved by the library, in another order of names."""
    remix = {"alpha": alpha, "beta": 1.3, "gamma": 0.9, "preset": preset, "gain": gain}
    weights = {"u": 3.0, "t": 1.0}
    matrix = InfluenceMatrix(VALUES_VD, domains=DOMAINS, tasks=TASKS, standard_error_VD=ERRORS_VD)
    references = {"prior": PRIOR, "uniform": None, "proportional": Mixture.proportional(SIZES)}
    goal = goal_of(
        **remix,
        task_weights=None if preset else weights,
        diversity_reference=references[reference],
    )
    solution = solve_tikmix_d(matrix, PRIOR, goal, constraints)
    rules = Rules(policy="tikmix_d", goal=goal, constraints=constraints, tasks=tuple(TASKS))
    config = {
        "remix": {**remix, "diversity_reference": reference},
        "tasks": {name: {"weight": weight} for name, weight in weights.items()},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    drawn = {"b": 40, "a": 50, "junk": 60}
    shared = {
        "domain_samples": drawn,
        "domain_epochs": {name: drawn[name] / SIZES[name] for name in drawn},
        "task_loss": {},
    }
    first = {"stage": 0, "start_iteration": 0, "start_sample": 0, "weights": PRIOR.to_json()}
    second = {
        "stage": 1,
        "start_iteration": 10,
        "start_sample": 150,
        "weights": solution.mixture.to_json(),
        "source": "tikmix_d",
        "reason": "why not",
        "solution": solution.to_json(),
        "rules": rules.to_json(),
        "total_variation": solution.total_variation,
        "total_variation_noise": 0.01,
        **matrix.to_json(),
    }
    for row in (first, second):
        append_jsonl(folder / "mixture.jsonl", {**shared, **row})
    return open_run(str(folder)), solution, remix, weights, references[reference]


def terms_by_hand(weights_D, remix, task_weights, reference):
    """−L(w) in its parts, written out anew: gain by task, uniformity, diversity."""
    rows_VD = VALUES_VD / np.abs(VALUES_VD).max(axis=1, keepdims=True)
    gains_V = rows_VD @ weights_D
    paper = remix["preset"] == "paper"
    u_V = np.array([1.0 if paper else task_weights[task] for task in TASKS])
    u_V = u_V / u_V.sum()
    worth_V = gains_V if remix["gain"] == "linear" else 1 + np.log(gains_V)
    std = np.sqrt((u_V * (gains_V - u_V @ gains_V) ** 2).sum())
    diversity = -(weights_D * np.log(weights_D)).sum()
    if reference is not None:
        diversity += (weights_D * np.log([reference[name] for name in DOMAINS])).sum()
    scale = len(TASKS) if paper else 4.0
    return {
        "gain": remix["beta"] * scale * u_V * worth_V,
        "uniformity": -remix["alpha"] * std,
        "diversity": remix["gamma"] * diversity,
    }


@pytest.mark.parametrize(
    ("preset", "gain", "reference"),
    [
        (None, "log", "prior"),
        (None, "log", "proportional"),
        (None, "linear", "uniform"),
        ("paper", "linear", "uniform"),
    ],
)
def test_every_term_is_the_slope_of_its_part_of_the_objective(tmp_path, preset, gain, reference):
    history, solution, remix, task_weights, target = run_of_one_decision(
        tmp_path, CAPPED, preset=preset, gain=gain, reference=reference
    )
    solved_D = np.array([solution.mixture[name] for name in DOMAINS])
    for domain in DOMAINS:
        found = why(history, domain)
        # Towards the domain, away from all others in proportion: the mixture stays one.
        step_D = (np.array(DOMAINS) == domain) - solved_D
        h = 1e-6
        up, down = (
            terms_by_hand(solved_D + sign * h * step_D, remix, task_weights, target)
            for sign in (1, -1)
        )
        slope_V = (up["gain"] - down["gain"]) / (2 * h)
        np.testing.assert_allclose([found.gain[task] for task in TASKS], slope_V, atol=1e-7)
        for name in ("uniformity", "diversity"):
            slope = (up[name] - down[name]) / (2 * h)
            assert getattr(found, name) == pytest.approx(slope, abs=1e-6), name
        change = found.change
        assert change is not None
        parts = [*change.gain.values(), change.uniformity, change.constraints]
        parts += [change.diversity, change.shared]
        assert sum(parts) == pytest.approx(found.solved - found.before, abs=1e-6)
        assert change.total == found.solved - found.before


@pytest.mark.parametrize("reference", ["prior", "proportional", "uniform"])
def test_a_change_is_what_the_optimum_says_it_is(tmp_path, reference):
    """Without constraints: w_j ∝ r_j exp((gain + uniformity) / γ), so parts have closed forms."""
    history, solution, *_, target = run_of_one_decision(tmp_path, reference=reference)
    target = target or Mixture.uniform(DOMAINS)
    log_factors = []
    for domain in DOMAINS:
        change = why(history, domain).change
        assert change is not None
        ratio = np.log(solution.mixture[domain] / PRIOR[domain])
        mean = change.total / ratio
        assert change.diversity / mean == pytest.approx(np.log(target[domain] / PRIOR[domain]))
        assert change.constraints == pytest.approx(0, abs=1e-4)
        pushed = sum(change.gain.values()) + change.uniformity
        log_factors.append(pushed / mean - np.log(solution.mixture[domain] / target[domain]))
    # What is left is the same for all: the shared part.
    np.testing.assert_allclose(log_factors, log_factors[0], atol=1e-3)
    divergence = sum(w * np.log(w / target[name]) for name, w in solution.mixture.items())
    assert -log_factors[0] == pytest.approx(divergence, abs=1e-3)


def test_without_constraints_nothing_is_left_to_push(tmp_path):
    history, *_ = run_of_one_decision(tmp_path, alpha=0.1)
    for domain in DOMAINS:
        found = why(history, domain)
        assert found.active_constraints == []
        assert found.constraints == 0
        assert found.shared == pytest.approx(0, abs=1e-4)
        assert found.solved == pytest.approx(found.after)
        assert found.note == ""


def test_a_constraint_that_binds_is_named_and_pushes_back(tmp_path):
    history, *_ = run_of_one_decision(tmp_path, CAPPED)
    held, free = why(history, "a"), why(history, "b")
    assert held.active_constraints == ["upper:a"]
    assert free.active_constraints == []
    assert held.constraints is not None
    assert held.constraints < -0.1


def test_where_all_tasks_gain_alike_uniformity_is_what_keeps_it_so(tmp_path):
    history, *_ = run_of_one_decision(tmp_path, preset="paper", gain="linear", alpha=5.0)
    for domain in DOMAINS:
        found = why(history, domain)
        assert found.constraints == 0
        others = sum(found.gain.values()) + found.diversity
        assert found.uniformity == pytest.approx(-others, abs=1e-4)
        assert "all tasks gain alike" in found.note


def test_the_noise_of_a_push(tmp_path):
    """With α = 0 and equal tasks, the price of a task is 4·u·β / P̂."""
    history, solution, *_ = run_of_one_decision(tmp_path, alpha=0.0)
    rows_VD = VALUES_VD / np.abs(VALUES_VD).max(axis=1, keepdims=True)
    gains_V = rows_VD @ [solution.mixture[name] for name in DOMAINS]
    price_V = 4 * np.array([0.75, 0.25]) * 1.3 / gains_V
    expected = price_V @ (ERRORS_VD[:, 2] / [2.0, 5.0])
    assert why(history, "junk").noise == pytest.approx(expected)


def test_what_cannot_be_explained_is_said(tmp_path):
    history, *_ = run_of_one_decision(tmp_path)
    with pytest.raises(InputError, match="no domain named 'c'; this run has"):
        why(history, "c")
    with pytest.raises(InputError, match="--stage 7: no influence was measured before it; try 1"):
        why(history, "a", 7)
    history = open_run(str(tmp_path))
    history.stages.replace_last(replace(history.stages[1], rules=None))
    with pytest.raises(InputError, match="an earlier version: its row lacks the goal"):
        why(history, "a")


@pytest.mark.parametrize("stage", [[], ["--stage", "1"]])
def test_a_domain_added_after_the_boundary_is_said_to_be(tmp_path, capsys, stage):
    run_of_one_decision(tmp_path)
    added = {"start_iteration": 15, "start_sample": 200, "source": "added"}
    weights = {"b": 0.25, "a": 0.25, "junk": 0.25, "new": 0.25}
    append_jsonl(tmp_path / "mixture.jsonl", {"stage": 2, **added, "weights": weights})
    assert main(["inspect", "why", str(tmp_path), "new", *stage]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: stage 1: domain new was added later, with stage 2; ask of")
    assert told.count("\n") == 1


def test_a_kept_mixture_and_a_measured_one_are_noted(tmp_path):
    history, *_ = run_of_one_decision(tmp_path)
    solution = replace(history.stages[1].solution, certificate=None)
    kept = replace(history.stages[1], source="kept", weights=PRIOR, solution=solution)
    history.stages.replace_last(kept)
    found = why(history, "junk")
    assert (found.before, found.after) == (0.4, 0.4)
    assert found.solved < 0.4
    assert found.constraints is None
    assert "TiKMiX-M chose by measured candidates" in found.note
    assert "the mixture was kept" in found.note
    # The lines that are printed add up here too.
    console = Console(file=io.StringIO(), width=120)
    show_why(found, console)
    lines = console.file.getvalue().replace("−", "-").splitlines()
    points = {line[:34].strip(): line.split()[-1] for line in lines if re.search(r"[+-]\d", line)}
    total = float(points.pop("sum"))
    parts = {name: part for name, part in points.items() if re.match("gain|unif|div|all|out", name)}
    assert any(name.startswith("outcomes that TiKMiX-M measured") for name in parts)
    assert sum(map(float, parts.values())) == pytest.approx(total, abs=0.04)


def test_answers_hold_the_ledgers_numbers(tmp_path):
    ledger, metrics = make_run(tmp_path, ["a", "b", "c"], ["t", "u"], stages=3, seed=2)
    history = open_run(str(tmp_path))
    answer = mixture(history)
    assert answer["iterations"] == [0, 120, 240]
    for row in answer["domains"]:
        assert row["weights"] == [stage["weights"][row["domain"]] for stage in ledger]
    assert sum(row["tokens"] for row in answer["domains"]) == pytest.approx(360 * 16 * 128)
    for stage in (1, None):
        answer = influence(history, stage)
        source = ledger[answer["stage"]]
        for row in answer["tasks"]:
            for domain, entry in row["domains"].items():
                assert entry["influence"] == source["influence"][row["task"]][domain]
                assert entry["standard_error"] == source["influence_se"][row["task"]][domain]
    answer = summary(history)
    assert answer["iteration"] == 360
    assert [row["source"] for row in answer["boundaries"]] == ["tikmix_d", "tikmix_d"]
    assert answer["task_losses"]["360"] == metrics[-1]["task_loss"]


def test_runs_are_compared_at_equal_samples(tmp_path):
    """The second run has half the iterations of double the samples each."""
    runs = []
    for name, samples, losses in (("one", 4, [5.0, 4.0, 3.0]), ("two", 8, [5.0, 3.5])):
        folder = tmp_path / name
        folder.mkdir()
        config = {"run_dir": name, "train": {"global_batch_size": samples}, "seed": 1}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        row = {"stage": 0, "start_iteration": 0, "start_sample": 0, "task_loss": {"t": losses[0]}}
        weights = {"a": 0.5, "b": 0.5} if samples == 4 else {"a": 0.2, "b": 0.8}
        append_jsonl(folder / "mixture.jsonl", {**row, "weights": weights})
        for number, loss in enumerate(losses[1:], start=1):
            row = {"iteration": number, "consumed_samples": number * samples}
            append_jsonl(folder / "metrics.jsonl", {**row, "task_loss": {"t": loss}})
        runs.append(open_run(str(folder)))
    answer = compare(*runs)
    assert [row["samples"] for row in answer["losses"]] == [0, 8]
    assert answer["losses"][1]["tasks"]["t"] == {"first": 3.0, "second": 3.5, "difference": 0.5}
    assert answer["total_variation"] == pytest.approx(0.3)
    assert answer["settings"] == [{"setting": "train.global_batch_size", "first": 4, "second": 8}]


def test_the_command_prints_tables_json_and_errors(tmp_path, capsys):
    run_of_one_decision(tmp_path)
    for command in (["summary"], ["mixture"], ["influence"], ["why", "junk"], ["compare"]):
        arguments = [command[0], str(tmp_path), *(command[1:] or [str(tmp_path)])]
        if command[0] in ("summary", "mixture", "influence"):
            arguments = arguments[:2]
        assert main(["inspect", *arguments]) == 0
        assert "junk" in capsys.readouterr().out
        assert main(["inspect", *arguments, "--json"]) == 0
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main(["inspect", "why", str(tmp_path), "junk"]) == 0
    told = capsys.readouterr().out
    (total,) = re.findall(r"^sum +[+−]0\.000 +([+−][\d.]+)", told, re.MULTILINE)
    parts = re.findall(r"^(?:gain|unif|diver|active|all)[^+−–]+(?:[+−][\d.]+|–) +(\S+)", told, re.M)
    added = sum(float(part.replace("−", "-")) for part in parts)
    assert added == pytest.approx(float(total.replace("−", "-")), abs=0.04)  # as rounded
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    with open(tmp_path / "mixture.jsonl", "a") as file:
        file.write('{"stage": 2, "wei')  # being written at this moment
    assert main(["inspect", "summary", str(tmp_path)]) == 0
    (tmp_path / "empty").mkdir()
    for folder, words in (("nowhere", "is not a directory"), ("empty", "no mixture.jsonl")):
        capsys.readouterr()
        assert main(["inspect", "summary", str(tmp_path / folder)]) == 2
        assert words in capsys.readouterr().err
