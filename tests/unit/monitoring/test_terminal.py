"""What the terminal says, captured as text: the right numbers, in the room there is."""

import io
import re

import pytest
from rich.console import Console

from megatron_tikmix.monitoring.terminal import Terminal
from megatron_tikmix.monitoring.words import DASH
from tests.make_run import SEQUENCE_LENGTH, make_run, row_of

MINUS = "\N{MINUS SIGN}"
SIX = ["prose", "python", "licences", "man_pages", "c_headers", "noise"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain():
    return Console(file=io.StringIO(), width=100)


def boundary(domains, tasks, tmp_path):
    """The lines of one boundary, and the ledger's rows before and after it."""
    ledger, _ = make_run(tmp_path, domains, tasks, stages=3, seed=2)
    console = plain()
    terminal = Terminal(360, console=console)
    former, row = ledger[1:]
    tokens = {name: SEQUENCE_LENGTH * n for name, n in row["domain_samples"].items()}
    terminal.boundary(row_of(former), row_of(row), tokens)
    return console.file.getvalue().splitlines(), former, row


def shown_rows(lines):
    """First and following cells of the table's rows, in which every weight has its arrow."""
    return [line.split() for line in lines if re.search(r"\d → \d", line)]


def test_a_logged_step_is_one_line_as_megatron_writes_it():
    clock, console = Clock(), plain()
    terminal = Terminal(720, console=console, clock=clock)
    row = {"consumed_samples": 1920, "learning_rate": 1e-3, "grad_norm": 0.9}
    clock.now = 16.0
    terminal.step({"iteration": 120, "lm_loss": 4.53, "tokens_per_second": 9000.4} | row)
    assert console.file.getvalue() == (
        " iteration 120/720 | consumed samples 1920 | lm loss 4.5300 | learning rate 1.0e-03 "
        "| grad norm 0.90 | tokens/s 9000 | time left 1:20\n"
    )


def test_a_resumed_run_counts_its_own_iterations_only():
    clock, console = Clock(), plain()
    terminal = Terminal(200, start_iteration=100, console=console, clock=clock)
    clock.now = 10.0
    row = {"iteration": 150, "consumed_samples": 1, "learning_rate": 1e-3}
    terminal.step(row | {"lm_loss": None, "grad_norm": None, "tokens_per_second": None})
    assert console.file.getvalue() == (
        f" iteration 150/200 | consumed samples 1 | lm loss {DASH} | learning rate 1.0e-03 "
        f"| grad norm {DASH} | tokens/s {DASH} | time left 0:10\n"
    )


@pytest.mark.parametrize("tasks", [["prose"], ["a", "b", "c", "d"], list("abcdef")])
def test_a_boundary_shows_every_domain_with_its_influence(tmp_path, tasks):
    lines, former, row = boundary(SIX, tasks, tmp_path)
    assert max(map(len, lines)) <= 100
    assert "Influence in units of 1e-3" in " ".join(lines)
    by_name = {cells[0]: cells for cells in shown_rows(lines)}
    assert by_name.keys() == set(SIX)
    for name, cells in by_name.items():
        assert cells[1] == f"{100 * former['weights'][name]:.1f}"
        assert cells[3] == f"{100 * row['weights'][name]:.1f}"
        wanted = [
            f"{1e3 * row['influence'][task][name]:+.2f}±{1e3 * row['influence_se'][task][name]:.2f}"
            for task in tasks
        ]
        assert cells[4 : 4 + len(tasks)] == [cell.replace("-", MINUS) for cell in wanted]
        tokens = SEQUENCE_LENGTH * row["domain_samples"][name]
        assert cells[4 + len(tasks) :] == [f"{tokens / 1e3:#.3g}".rstrip("."), "k"]
    words = " ".join(" ".join(lines).split())
    assert "tikmix_d: the change is 3.1 times its noise." in words
    assert f"Total variation {row['total_variation']:.3f} (noise 0.021)." in words
    assert "Probe: 98.3 k tokens in 3.2 s." in words


def test_domains_that_are_repeated_are_named(tmp_path):
    lines, _, row = boundary(SIX, ["a"], tmp_path)
    epochs = {name: value for name, value in row["domain_epochs"].items() if value > 1}
    assert not epochs
    assert "Epochs so far" not in " ".join(lines)
    console = plain()
    terminal = Terminal(360, console=console)
    row["domain_epochs"] = {**row["domain_epochs"], SIX[1]: 3.14159, SIX[2]: 1.5}
    terminal.boundary(None, row_of(row), {})
    words = " ".join(console.file.getvalue().split())
    assert f"in their second or later: {SIX[1]} 3.14, {SIX[2]} 1.50." in words


@pytest.mark.parametrize("tasks", [["arc", "piqa"], list("abcdef"), [f"t{i}" for i in range(57)]])
def test_of_many_domains_the_largest_moves_are_shown(tmp_path, tasks):
    domains = [f"crawl_{i:03d}_{'x' * (i % 60)}" for i in range(200)]
    lines, former, row = boundary(domains, tasks, tmp_path)
    assert max(map(len, lines)) <= 100
    head = next(line for line in lines if line.startswith("domain"))
    assert head.rstrip().endswith("tokens")  # names give way to numbers, never the reverse
    change = {name: abs(row["weights"][name] - former["weights"][name]) for name in domains}
    ranked = sorted(domains, key=lambda name: -change[name])
    assert [cells[0][:9] for cells in shown_rows(lines)] == [name[:9] for name in ranked[:20]]
    most = f"{100 * change[ranked[20]]:.2f}"
    assert f"Not shown: 180 domains that moved by at most {most} points." in " ".join(lines)


def test_of_many_tasks_the_mean_is_shown_over_all_domains(tmp_path):
    domains = [f"d{i:02d}" for i in range(30)]
    tasks = [f"t{i}" for i in range(7)]
    lines, _, row = boundary(domains, tasks, tmp_path)
    assert "Mean over 7 tasks" in " ".join(lines)
    for name, *cells in shown_rows(lines):
        value = error = 0.0
        for task in tasks:
            largest = max(map(abs, row["influence"][task].values()))
            value += row["influence"][task][name] / largest / 7
            error += row["influence_se"][task][name] / largest / 7
        assert cells[3] == f"{value:+.2f}±{error:.2f}".replace("-", MINUS)


@pytest.mark.parametrize("width", [60, 80, 90])
def test_where_tasks_have_no_room_the_mean_is_shown_and_no_number_is_cut(tmp_path, width):
    ledger, _ = make_run(tmp_path, SIX, list("abcdef"), stages=2, seed=2)
    console = Console(file=io.StringIO(), width=width)
    Terminal(360, console=console).boundary(*map(row_of, ledger), {})
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "Mean over 6 tasks" in " ".join(lines)
    rows = shown_rows(lines)
    assert {cells[0] for cells in rows} == set(SIX)
    assert all(re.fullmatch(rf"[+{MINUS}]\d\.\d\d±\d\.\d\d", cells[4]) for cells in rows)


def test_names_are_neither_markup_nor_columns(tmp_path):
    lines, _, _ = boundary(
        ["[red]a[/red]", "\x1b[31mb", "c\x9dd"], ["tokens", "weight %"], tmp_path
    )
    assert {cells[0] for cells in shown_rows(lines)} == {"[red]a[/red]", "�[31mb", "c�d"}
    for cells in shown_rows(lines):
        assert sum("±" in cell for cell in cells) == 2
    assert "\x1b" not in "".join(lines)


def test_the_first_stage_has_weights_and_no_moves(tmp_path):
    ledger, _ = make_run(tmp_path, SIX, ["t"], stages=1, seed=2)
    console = plain()
    Terminal(10, console=console).boundary(None, row_of(ledger[0]), {})
    text = console.file.getvalue()
    assert text.count("16.7 → 16.7") == 6
    assert "±" not in text
    assert "initial: the initial mixture." in text


def test_a_log_hears_of_each_phase_once():
    console = plain()
    terminal = Terminal(10, console=console)
    for text in ["probe: 1/3 sub-batches", "probe: 2/3 sub-batches", "solve", "", "probe: 1/3"]:
        terminal.status(text)
    assert console.file.getvalue() == " probe: 1/3 sub-batches\n solve\n probe: 1/3\n"


def test_evaluation_lists_few_tasks_and_averages_many():
    console = plain()
    terminal = Terminal(10, console=console)
    terminal.evaluation(5, {"a": 2.0, "b": 3.0, "c": None})
    terminal.evaluation(6, {f"t{i}": float(i) for i in range(20)})
    assert console.file.getvalue().splitlines() == [
        f" task loss at iteration 5 | mean {DASH} | a 2.0000 | b 3.0000 | c {DASH}",
        " task loss at iteration 6 | mean over 20 tasks 9.5000",
    ]


def test_finish_says_where_everything_is(tmp_path):
    clock, console = Clock(), plain()
    terminal = Terminal(720, console=console, clock=clock)
    clock.now = 250.0
    run_dir = tmp_path / ("long" * 40)
    terminal.finish(run_dir, probe_token_share=0.0512, probe_time_share=0.08)
    text = console.file.getvalue()
    assert "Done: 720 iterations in 4:10." in text
    assert "The probe took 5.1 % of all tokens processed, 8.0 % of the time." in text
    assert f"tensorboard --logdir {run_dir / 'tensorboard'}\n" in text
    assert f"{run_dir / 'report.html'}\n" in text


def test_on_a_terminal_there_is_a_bar_and_it_goes_away(tmp_path):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    row = {"consumed_samples": 1, "learning_rate": 1e-3, "grad_norm": 1.0}
    with Terminal(720, console=console) as terminal:
        terminal.step(row | {"iteration": 120, "lm_loss": 4.53, "tokens_per_second": 9000.0})
        terminal.status("probe: 3/48 sub-batches")
    text = file.getvalue()
    assert "iteration 120/720" in text
    assert "loss 4.5300 · 9.00 k tokens/s" in text
    assert "probe: 3/48 sub-batches" in text
    assert "| lm loss" not in text  # no log rows beside the bar
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_quiet_one_says_nothing(capsys):
    with Terminal(10, quiet=True) as terminal:
        terminal.evaluation(5, {"a": 2.0})
        terminal.finish("run")
    with Terminal(10) as terminal:
        terminal.evaluation(5, {"a": 2.0})
    out, err = capsys.readouterr()
    assert out == ""
    assert err == " task loss at iteration 5 | mean 2.0000 | a 2.0000\n"
