"""Ask about a run on the terminal, from its run directory alone, also while it goes on.

  tikmix inspect summary RUN_DIR                  where it is, what its boundaries did and cost
  tikmix inspect mixture RUN_DIR                  each domain's weight by stage, tokens, epochs
  tikmix inspect influence RUN_DIR [--stage K]    the matrix measured before a stage, with errors
  tikmix inspect why RUN_DIR DOMAIN [--stage K]   what pushed a domain's weight up or down
  tikmix inspect compare RUN_A RUN_B              losses at equal samples, mixtures, settings

--json prints the same as one JSON object, numbers unrounded, unknown ones as null.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

from rich.console import Console

from megatron_tikmix.cli.output import Answer, add_json, print_answer
from megatron_tikmix.monitoring import answers, tables

QUESTIONS = {
    "summary": "where a run is, what its boundaries did, and what they cost",
    "mixture": "every domain's weight in each stage, its tokens and epochs",
    "influence": "the influence matrix that was measured before a stage, with its errors",
    "why": "what pushed a domain's weight up or down, in parts that add up to the change",
    "compare": "two runs: losses after equally many samples, mixtures, settings that differ",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tikmix inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    questions = parser.add_subparsers(dest="question", required=True)
    for name, line in QUESTIONS.items():
        question = questions.add_parser(name, description=f"Show {line}.")
        question.add_argument("run_dir", metavar="RUN_A" if name == "compare" else "RUN_DIR")
        if name == "compare":
            question.add_argument("other", metavar="RUN_B")
        if name == "why":
            question.add_argument("domain", metavar="DOMAIN")
        if name in ("influence", "why"):
            question.add_argument(
                "--stage", type=int, metavar="K", help="the stage decided (default: the last)"
            )
        add_json(question)
    return parser


def answer_to(arguments: argparse.Namespace) -> tuple[Answer, Callable[[Console], None]]:
    """Return the answer, and what prints it on a console.

    Raises:
        InputError: no such run, stage or domain, or a damaged file.
    """
    history = answers.open_run(arguments.run_dir)
    if arguments.question == "why":
        found = answers.why(history, arguments.domain, arguments.stage)
        return found.to_json(), partial(tables.show_why, found)
    if arguments.question == "compare":
        names = [arguments.run_dir, arguments.other]
        answer = answers.compare(history, answers.open_run(arguments.other))
        return answer, lambda console: tables.show_compare(answer, names, console)
    if arguments.question == "influence":
        answer = answers.influence(history, arguments.stage)
        return answer, partial(tables.show_influence, answer)
    if arguments.question == "mixture":
        answer = answers.mixture(history)
        return answer, partial(tables.show_mixture, answer)
    answer = answers.summary(history)
    return answer, partial(tables.show_summary, answer)


def main(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    answer, show = answer_to(arguments)
    print_answer(answer, show, as_json=arguments.json)
    return 0
