"""Tokens per second of tools/preprocess_data.py, beside stock Megatron-LM's tool.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM /elsewhere/Megatron-LM
    python benchmarks/preprocess.py --megatron /elsewhere/Megatron-LM

Both run as commands, in turn, on the same JSON lines, with the same Hugging Face tokenizer and the
same number of workers; their .bin and .idx files must be the same, byte for byte. Each is run on a
few lines too, and the seconds of that (imports, processes) are taken off: what is left is the rate
on much text. With the best of the repetitions of each, figures are

  seconds     of the whole command, start included
  start       of the same command on 20 lines
  tokens/s    tokens over the difference, and over workers
  CPU         tokens over the difference in CPU seconds, of all processes of the command

Stock Megatron's tool needs the packages transformers and triton; --python names an interpreter
that has them, if this one has not.

The text, without --input: documents of this machine (tools/build_corpus.py), in a new order every
time that they are used again, up to --megabytes. The tokenizer, without --tokenizer: a byte-level
BPE trained on it.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_tikmix.data.token_files import TokenFiles
from megatron_tikmix.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
DOMAINS = ("python_code", "python_docs", "cpp_headers", "package_prose")
EOD = "<|endoftext|>"
OURS, STOCK = "tools/preprocess_data.py", "Megatron-LM"


@dataclass(frozen=True)
class Cost:
    """Of one run of a command."""

    seconds: float
    cpu_seconds: float


def run(command: list[str], where: Path = ROOT, **environment: str) -> Cost:
    """Run a command to its end.

    Raises:
        InputError: it failed; its last line is told.
    """
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, cwd=where, capture_output=True, text=True, env={**os.environ, **environment}
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"{' '.join(command[:3])} failed: {last}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, cpu)


def ours(text: Path, output: Path, tokenizer: Path, workers: int) -> Cost:
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--workers", str(workers)]
    command += ["--input", f"text:train={text}", "--output", str(output)]
    return run([*command, "--tokenizer", str(tokenizer)], PYTHONPATH=str(ROOT))


def stock(
    megatron: Path, python: str, text: Path, output: Path, tokenizer: Path, workers: int
) -> Cost:
    output.mkdir()
    command = [python, str(megatron / "tools" / "preprocess_data.py"), "--append-eod"]
    command += ["--input", str(text), "--output-prefix", str(output / "stock")]
    command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
    command += ["--workers", str(workers), "--log-interval", "1000000"]
    return run(command, megatron, PYTHONPATH=str(megatron))


# The text and the tokenizer ----------------------------------------------------------------


def make_text(folder: Path, megabytes: float) -> Path:
    """JSON lines of documents that are on this machine, each of about as many bytes."""
    run([sys.executable, str(TOOLS / "build_corpus.py"), "--output", str(folder / "corpus")])
    lines: list[bytes] = []
    for domain in DOMAINS:
        path = folder / "corpus" / domain / "train.jsonl"
        lines += path.read_bytes().splitlines(keepends=True)
    generator = random.Random(1)  # noqa: S311 - an order, not a secret
    text = folder / "text.jsonl"
    with text.open("wb") as file:
        while file.tell() < megabytes * 1e6:
            generator.shuffle(lines)
            for line in lines:
                file.write(line)
                if file.tell() >= megabytes * 1e6:
                    break
    return text


def make_tokenizer(folder: Path, text: Path, vocab_size: int) -> Path:
    """A folder that both tools read: tokenizer.json, and which token ends a document."""
    output = folder / "tokenizer"
    command = [sys.executable, str(TOOLS / "preprocess_data.py"), "--train_tokenizer"]
    command += ["--vocab_size", str(vocab_size), "--input", f"text:train={few_lines(text, 2000)}"]
    run([*command, "--output", str(output)], PYTHONPATH=str(ROOT))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOD}
    (output / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return output


def few_lines(text: Path, count: int) -> Path:
    """The first lines of a file, in one beside it."""
    path = text.with_name(f"first-{count}.jsonl")
    with text.open("rb") as file:
        path.write_bytes(b"".join(line for line, _ in zip(file, range(count), strict=False)))
    return path


# Measuring ---------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The rows of the table, two for each number of workers."""
    text = arguments.input or make_text(folder, arguments.megabytes)
    link = folder / "input.jsonl"
    link.symlink_to(text.resolve())
    tokenizer = arguments.tokenizer or make_tokenizer(folder, link, arguments.vocab_size)
    few = few_lines(link, 20)
    tools: dict[str, Callable[[Path, Path, Path, int], Cost]] = {
        OURS: ours,
        STOCK: partial(stock, arguments.megatron.resolve(), arguments.python),
    }
    rows = []
    for workers in arguments.workers:
        costs: dict[tuple[str, Path], list[Cost]] = {}
        outputs: dict[str, Path] = {}
        for repetition in range(arguments.repetitions):
            for name, tool in tools.items():
                for source in (few, link):
                    output = (
                        folder / f"{name.replace('/', '_')}-{workers}-{repetition}-{source.stem}"
                    )
                    cost = tool(source, output, tokenizer, workers)
                    costs.setdefault((name, source), []).append(cost)
                outputs[name] = output
        prefixes = outputs[OURS] / "text_train", outputs[STOCK] / "stock_text_document"
        same = all(
            Path(f"{prefixes[0]}.{suffix}").read_bytes()
            == Path(f"{prefixes[1]}.{suffix}").read_bytes()
            for suffix in ("bin", "idx")
        )
        tokens = TokenFiles.read(prefixes[0], "the benchmark").tokens
        for name in tools:
            whole, start = costs[name, link], costs[name, few]
            seconds, first = min(c.seconds for c in whole), min(c.seconds for c in start)
            cpu = min(c.cpu_seconds for c in whole) - min(c.cpu_seconds for c in start)
            rows.append(
                {
                    "tool": name,
                    "workers": workers,
                    "tokens": tokens,
                    "same_bytes": same,
                    "seconds": seconds,
                    "start_seconds": first,
                    "tokens_per_second_per_worker": tokens / (seconds - first) / workers,
                    "tokens_per_cpu_second": tokens / cpu,
                }
            )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    title = f"{rows[0]['tokens']:,} tokens, {os.cpu_count()} CPUs"
    table = Table("tool", title=title)
    for heading in ("workers", "seconds", "start", "tokens/s/worker", "tokens/CPU s"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["tool"],
            str(row["workers"]),
            f"{row['seconds']:.1f}",
            f"{row['start_seconds']:.1f}",
            f"{row['tokens_per_second_per_worker']:,.0f}",
            f"{row['tokens_per_cpu_second']:,.0f}",
        )
    console.print(table)


def problems(rows: list[dict[str, Any]]) -> list[str]:
    """What misses the target: at least stock Megatron's rate, and the same bytes."""
    found = []
    by_tool = {(row["tool"], row["workers"]): row for row in rows}
    for workers in sorted({row["workers"] for row in rows}):
        mine, theirs = by_tool[OURS, workers], by_tool[STOCK, workers]
        if not mine["same_bytes"]:
            found.append(f"{workers} workers: the two tools wrote different files")
        rates = [row["tokens_per_second_per_worker"] for row in (mine, theirs)]
        print(f"{workers} workers: {rates[0] / rates[1]:.2f} times Megatron-LM's tokens/s")
        if rates[0] < rates[1]:
            found.append(f"{workers} workers: slower than Megatron-LM's tool")
    return found


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--megatron", type=Path, required=True, metavar="DIR", help="a checkout of Megatron-LM")
    add("--python", default=sys.executable, metavar="FILE", help="the interpreter of its tool")
    add("--input", type=Path, metavar="FILE", help="JSON lines with a field text")
    add("--tokenizer", type=Path, metavar="DIR", help="a folder of Hugging Face transformers")
    add("--megabytes", type=float, default=40, metavar="N", help="of text (default: 40)")
    add("--vocab_size", type=int, default=16_384, metavar="N", help="(default: 16384)")
    add("--workers", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    add("--repetitions", type=int, default=3, metavar="N", help="of each (default: 3)")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    add("--check", action="store_true", help="exit with 1 if slower than Megatron-LM's tool")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        if not (arguments.megatron / "tools" / "preprocess_data.py").is_file():
            raise InputError(f"--megatron {arguments.megatron}: no tools/preprocess_data.py in it")
        with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
            rows = measure(arguments, Path(folder))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(rows, Console())
    missed = problems(rows)
    for problem in missed:
        print(f"missed: {problem}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
