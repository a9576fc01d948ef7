"""Whether TiKMiX beats what people use, by experiment: the same model, tokens and learning rates
for every policy, paired by seed, and every policy's cost of deciding counted.

  comparison  uniform, uniform without junk, proportional, temperature, UniMax, the best static
              mixture found, RegMix, DoReMi-style, ODM, and TiKMiX-D and -M
  ablations   the default of TiKMiX-D with one thing changed at a time
  outcomes    influence of a mixture against the loss of a whole run on it
  drift       do rankings of domains move while the model learns?

Every run is kept once it is there, so that a stopped command goes on where it was. Results:
WORK/<profile>/claims.json, claims.md and two pictures.

examples:
  python benchmarks/claims --profile smoke
  python benchmarks/claims --profile cpu --jobs 2
  python benchmarks/claims --profile cpu --parts comparison drift --json claims.json
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

for module in ("megatron", "torch"):  # their notes on optional packages; before they are imported
    warnings.filterwarnings("ignore", module=rf"{module}\..*")

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT / "benchmarks")  # so that `claims` is this package, wherever it is started

from rich.console import Console  # noqa: E402

from claims import figures, pictures, policies, studies, tables  # noqa: E402
from claims.checks import misses  # noqa: E402
from claims.profile import Profile  # noqa: E402
from claims.runs import Runner  # noqa: E402
from megatron_tikmix.errors import InputError  # noqa: E402

PARTS = ("comparison", "ablations", "outcomes", "drift")


def fetch(runner: Runner) -> None:
    """The profile's corpus, unless it is there."""
    if runner.manifest.is_file():
        return
    folder = runner.manifest.parents[1]
    kind, *options = runner.profile.corpus
    commands = {
        "fetched": [[str(ROOT / "benchmarks" / "corpus.py"), "--output", str(folder), *options]],
        "embedded": [
            [str(ROOT / "tools" / "build_corpus.py"), "--output", str(folder / "corpus"), *options],
            [
                *(str(ROOT / "tools" / "preprocess_data.py"), "--input", str(folder / "corpus")),
                *("--output", str(folder / "tokens"), "--train_tokenizer", "--vocab_size", "512"),
            ],
        ],
    }
    for command in commands[kind]:
        if subprocess.run([sys.executable, *command]).returncode:
            raise InputError("there is no text to train on; the reason is above")


def run(arguments: argparse.Namespace) -> int:
    profile = Profile.load(arguments.profile)
    folder = arguments.work / profile.name
    folder.mkdir(parents=True, exist_ok=True)
    runner = Runner(profile, folder, arguments.jobs)
    fetch(runner)
    shown, found = tables.Tables(), dict[str, Any]()
    for part in PARTS:
        if part in arguments.parts and (part != "ablations" or profile.ablations):
            _PARTS[part](runner, shown, found)
            _write(folder / "claims.json", json.dumps(tables.plain(found), indent=1) + "\n")
            _write(folder / "claims.md", shown.markdown)
    if arguments.json:
        _write(arguments.json, json.dumps(tables.plain(found), indent=1) + "\n")
    missed = misses(found) if arguments.check else []
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if missed else 0


def _comparison(runner: Runner, shown: tables.Tables, found: dict[str, Any]) -> None:
    profile = runner.profile
    lines = policies.all_policies(runner, _say)
    _say(f"{len(lines)} policies, {len(profile.seeds)} seeds")
    outcomes = policies.run_policies(runner, lines, profile.seeds)
    found["comparison"] = figures.comparison(outcomes, profile.tasks, profile.unseen_tasks)
    found["mixtures"] = {o.policy.name: o.runs[0]["stages"][-1]["weights"] for o in outcomes}
    found["chosen"] = {
        o.policy.name: {"weights": o.policy.choice.weights, "note": o.policy.choice.note}
        for o in outcomes
        if o.policy.choice
    }
    named = figures.by_name(outcomes)
    ours = named["TiKMiX-D"].runs
    found["against_ours"] = {
        o.policy.name: figures.difference(o.runs, ours, profile.tasks)
        for o in outcomes
        if o.runs is not ours
    }
    _write(runner.folder / "gap_closed.svg", pictures.gap_closed(found["comparison"]))
    shown_curves = ("uniform", "best static", "TiKMiX-D, paper", "TiKMiX-D", "TiKMiX-M, rollouts")
    curves = {
        n: figures.mean_curve(named[n].runs, profile.tasks) for n in shown_curves if n in named
    }
    _write(runner.folder / "losses.svg", pictures.losses(curves))
    tables.show_comparison(
        shown, found["comparison"], f"Policies, {len(profile.seeds)} paired seeds"
    )
    shown.add(
        "Loss less that of TiKMiX-D (positive: TiKMiX-D is better)",
        ["policy", "difference"],
        [[name, interval.text(sign=True)] for name, interval in found["against_ours"].items()],
    )


def _ablations(runner: Runner, shown: tables.Tables, found: dict[str, Any]) -> None:
    profile = runner.profile
    seeds = profile.seeds[: profile.ablation_seeds]
    changes = policies.ablations(runner)
    best = policies.chosen(
        "best static", policies.searches.best_static(runner, policies.domains(runner), _say)
    )
    always = [policies.heuristics(runner)[0], best, policies.Policy("default", policies.DEFAULT)]
    lines = always + [policy for table in changes.values() for policy in table]
    _say(f"{len(lines)} ablations, {len(seeds)} seeds")
    named = figures.by_name(policies.run_policies(runner, lines, seeds))
    uniform, static, default = (named[policy.name].runs for policy in always)
    found["ablations"] = {}
    for name, table in changes.items():
        rows = []
        for policy in [always[2], *table]:
            runs = named[policy.name].runs
            different = figures.difference(runs, default, profile.tasks)
            rows.append(
                {
                    "policy": policy.name,
                    "difference": None if runs is default else different,
                    "gap_closed": figures.gap_closed(runs, uniform, static, profile.tasks),
                    "decision_share": figures.decision_cost(named[policy.name])[2],
                }
            )
        found["ablations"][name] = rows
        tables.show_ablation(shown, name, rows)


def _outcomes(runner: Runner, shown: tables.Tables, found: dict[str, Any]) -> None:
    found["outcomes"] = studies.outcome_study(runner, policies.domains(runner))
    tables.show_outcomes(shown, found["outcomes"])


def _drift(runner: Runner, shown: tables.Tables, found: dict[str, Any]) -> None:
    found["drift"] = studies.drift_study(runner)
    tables.show_drift(shown, found["drift"])


_PARTS = {
    "comparison": _comparison,
    "ablations": _ablations,
    "outcomes": _outcomes,
    "drift": _drift,
}


def _say(text: str) -> None:
    Console(stderr=True).print(text, style="dim", markup=False, highlight=False)


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--profile",
        default="smoke",
        help="smoke (minutes, no network), cpu (hours in the background), confirm (cpu, on other "
        "domains and tasks), gpu (one large GPU); default: smoke",
    )
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these (default: all)")
    add("--jobs", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    add(
        "--work",
        type=lambda text: Path(text).resolve(),
        default=ROOT / "runs" / "claims",
        metavar="DIR",
        help="where corpora and runs are kept (default: runs/claims)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures")
    add("--check", action="store_true", help="exit with 1 if a goal is missed")
    return parser


def main(argv: list[str] | None = None) -> int:
    try:
        return run(build_parser().parse_args(argv))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
