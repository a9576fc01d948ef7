"""Turn text into the token files that Megatron trains on.

Reads what Hugging Face datasets reads from disk: JSON lines and text files, plain or compressed
(.gz, .bz2, .xz, .zst), Parquet, and folders that Dataset.save_to_disk wrote. A document is a
line's, or a row's, field --text_field; of text files --sample_by says what one is.

Every split of every domain becomes OUTPUT/<domain>_<split>.bin and .idx: the documents' tokens,
each document followed by the end-of-document token. Stock Megatron reads them, and files that it
wrote are taken in with --adopt. OUTPUT/domains.yaml, the manifest, names them all, with
checksums by which training knows that they are unchanged; it takes it as data.manifest.
The tokenizer is one that you give, or a byte-level BPE trained here on an equal share of every
domain's train split; it is kept beside the manifest.

The result is the same, byte for byte, for any number of workers and shards. Outputs take their
names only once all of them are complete, the manifest last. Started again, it goes on where it
stopped (OUTPUT/.unfinished holds what is ready), and does not do again what has not changed.
Domains that the manifest has and this run does not name stay in it.

Empty documents are left out and counted. A document that is malformed stops the run with its file
and line, or with --on_error skip is left out and counted by reason.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from megatron_tikmix.data.domains import DomainManifest, DomainSplit
from megatron_tikmix.data.tokenizer import END_OF_DOCUMENT, LIBRARIES, TokenizerFiles
from megatron_tikmix.errors import InputError
from megatron_tikmix.prepare.parts import Counts, Encoding
from megatron_tikmix.prepare.pipeline import PART_BYTES, Job, encode, plan
from megatron_tikmix.prepare.publish import Splits, adopt, merge, publish, still_whole
from megatron_tikmix.prepare.readers import Reading
from megatron_tikmix.prepare.sources import Source, find_sources
from megatron_tikmix.prepare.train_tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from megatron_tikmix.prepare.worker import limit_threads


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tikmix preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="""\
examples:
  # a folder of <domain>/train.jsonl and <domain>/validation.jsonl, a new tokenizer
  tikmix preprocess --input data/corpus --output data/tokens \\
      --train_tokenizer --vocab_size 2048

  # files of your own, a tokenizer that exists
  tikmix preprocess --output data/tokens --tokenizer tokenizer.json \\
      --input 'web:train=shards/web-*.jsonl.zst' --input web:validation=web-held-out.jsonl \\
      --input code:train=code-parquet/ --text_field content

  # many machines: a Slurm array (sbatch --array=0-31), whose script runs
  tikmix preprocess --input data/corpus --output data/tokens \\
      --tokenizer tokenizer.json --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT
  # and once all are done, the same with --merge
  tikmix preprocess --input data/corpus --output data/tokens \\
      --tokenizer tokenizer.json --merge

  # files that Megatron's own tool wrote stay where they are, and become domains
  tikmix preprocess --output data/tokens --tokenizer tokenizer.json \\
      --adopt web:train=/datasets/web_text_document
""",
    )
    _add_text(parser.add_argument_group("text"))
    _add_tokenizer(parser.add_argument_group("tokenizer"))
    _add_running(parser.add_argument_group("running"))
    return parser


def _add_text(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input",
        action="append",
        default=[],
        metavar="DIR | DOMAIN:SPLIT=WHAT",
        help="a folder of <domain>/<split>.jsonl (or another kind of file, or <domain>/<split>/ "
        "full of them); or what one split is made of: a file, a folder, or a quoted glob pattern; "
        "repeat for more",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add(
        "--adopt",
        action="append",
        default=[],
        metavar="DOMAIN:SPLIT=PREFIX",
        help="list PREFIX.bin and PREFIX.idx, which exist already; repeat for more",
    )
    add(
        "--text_field",
        default="text",
        metavar="NAME",
        help="the field or column that holds a document's text (default: text)",
    )
    add(
        "--sample_by",
        choices=("line", "paragraph", "document"),
        help="what one document is in text files: a line, a paragraph, or the whole file",
    )
    add(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do about a malformed document (default: stop)",
    )


def _add_tokenizer(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="a Hugging Face tokenizer.json, or a folder of Hugging Face transformers",
    )
    add(
        "--tokenizer_library",
        choices=LIBRARIES,
        help="read --tokenizer by megatron-core's tokenizer class for this library instead "
        "(byte-level needs no --tokenizer)",
    )
    add("--train_tokenizer", action="store_true", help="train a byte-level BPE on the train splits")
    add(
        "--vocab_size",
        type=int,
        metavar="N",
        help="tokens in the tokenizer to be trained (default: 2048)",
    )
    add(
        "--tokenizer_characters",
        type=int,
        default=6_000_000,
        metavar="N",
        help="text to train the tokenizer on, an equal share of each domain's train split, from "
        "the beginning of its files (default: 6000000)",
    )
    add(
        "--eod_token",
        metavar="TOKEN",
        help="the end-of-document token of --tokenizer (default: its own end-of-sequence token "
        f"where it names one, else {END_OF_DOCUMENT})",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--workers",
        type=int,
        default=available_cpus(),
        metavar="N",
        help="processes, and threads where the text is little (default: one per CPU)",
    )
    add(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="encode only the I-th of N shares of the work, I from 0 on; needs --tokenizer",
    )
    add("--merge", action="store_true", help="encode nothing: finish what the shards have made")
    add(
        "--part_bytes",
        type=int,
        default=PART_BYTES,
        metavar="N",
        help="size of the pieces that the text is divided into for processes, shards and restarts "
        f"(default: {PART_BYTES})",
    )
    add(
        "--replace",
        action="store_true",
        help="leave out of the manifest what it has and this run does not name",
    )


def parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 0 to N - 1, as 0/8")
    return int(index), int(count)


def available_cpus() -> int:
    """CPUs this process may use, which a batch system can make fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def check(arguments: argparse.Namespace) -> None:
    """Fill in the default vocabulary; refuse what cannot work."""
    for name in ("workers", "part_bytes"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} ({getattr(arguments, name)}) must be at least 1")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} is a file; give a folder")
    if not arguments.input and not arguments.adopt:
        raise InputError("there is nothing to do: give text with --input, or files with --adopt")
    given = arguments.tokenizer is not None or arguments.tokenizer_library is not None
    if given == arguments.train_tokenizer:
        which = "either --tokenizer or --train_tokenizer"
        raise InputError(f"give {which}{', not both' if given else ''}")
    if arguments.shard and arguments.merge:
        raise InputError("--merge is for after all shards are done; leave out --shard")
    if not arguments.train_tokenizer:
        if arguments.tokenizer is None and arguments.tokenizer_library != "byte-level":
            raise InputError(f"--tokenizer_library {arguments.tokenizer_library} needs --tokenizer")
        if arguments.vocab_size is not None:
            raise InputError("--vocab_size is for --train_tokenizer; leave it out with --tokenizer")
        return
    if arguments.eod_token is not None:
        raise InputError("--eod_token is for --tokenizer; leave it out with --train_tokenizer")
    if arguments.shard or arguments.merge:
        raise InputError(
            "--train_tokenizer cannot be sharded; train one first, on a part of the text and to "
            "another --output, and give its tokenizer.json with --tokenizer"
        )
    if arguments.vocab_size is None:
        arguments.vocab_size = 2048
    for name, least in (("vocab_size", SMALLEST_VOCABULARY), ("tokenizer_characters", 1)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} ({getattr(arguments, name)}) must be at least {least}")


def preprocess(arguments: argparse.Namespace) -> None:
    check(arguments)
    sources = find_sources(arguments.input)
    limit_threads(arguments.workers)
    output, unfinished = arguments.output, arguments.output / ".unfinished"
    reading = Reading(arguments.text_field, arguments.sample_by)
    tokenizer = make_tokenizer(arguments, sources, reading, unfinished)
    loaded = tokenizer.load("--tokenizer")
    encoding = Encoding(
        tokenizer,
        loaded.vocab_size,
        loaded.end_of_document(arguments.eod_token),
        reading,
        arguments.on_error,
    )
    manifest = DomainManifest(
        path=output / "domains.yaml",
        tokenizer=tokenizer,
        vocab_size=encoding.vocab_size,
        eod=encoding.eod,
        domains={},
        tokenizer_checksum=tokenizer.checksum(),
    )
    adopted = adopt(arguments.adopt, manifest)
    named = [(s.domain, s.split) for s in sources] + [
        (domain, split) for domain, splits in adopted.items() for split in splits
    ]
    if len(set(named)) < len(named):
        twice = max(named, key=named.count)
        raise InputError(f"{twice[0]}:{twice[1]} is given by --input and by --adopt; give one")
    earlier = earlier_splits(manifest, named, arguments.replace)

    jobs = plan(sources, encoding, unfinished, arguments.part_bytes)
    unchanged = [job for job in jobs if still_whole(earlier.get(job.source.key), job.source_digest)]
    todo = [job for job in jobs if job not in unchanged]
    output.mkdir(parents=True, exist_ok=True)
    if not arguments.merge:
        encode_all(todo, encoding, arguments.workers, arguments.shard or (0, 1))
    if arguments.shard:
        print_shard(arguments.shard, todo)
        return
    merged = {job: merge(job, encoding) for job in todo}
    kept: Splits = {}
    redone = {job.source.key for job in todo}
    for (domain, split), content in earlier.items():
        if (domain, split) not in redone:
            kept.setdefault(domain, {})[split] = content
    for domain, splits in adopted.items():
        kept[domain] = kept.get(domain, {}) | splits
    manifest = publish(manifest, merged, tokenizer, kept, named)
    clean_up(unfinished, tokenizer.path if arguments.train_tokenizer else None)
    print_table(manifest, {job.source.key: counts for job, counts in merged.items()})


def make_tokenizer(
    arguments: argparse.Namespace, sources: Sequence[Source], reading: Reading, folder: Path
) -> TokenizerFiles:
    if not arguments.train_tokenizer:
        return TokenizerFiles(arguments.tokenizer, arguments.tokenizer_library)
    if all(source.split != "train" for source in sources):
        raise InputError("--train_tokenizer: no domain has a train split; give one with --input")
    with Console(stderr=True).status("training the tokenizer"):
        return train_tokenizer(
            sources,
            reading,
            vocab_size=arguments.vocab_size,
            max_characters=arguments.tokenizer_characters,
            skip_bad=arguments.on_error == "skip",
            folder=folder,
        )


def earlier_splits(
    manifest: DomainManifest, named: Sequence[tuple[str, str]], replace: bool
) -> dict[tuple[str, str], DomainSplit]:
    """Return the splits in an earlier run's manifest that are to be kept, by (domain, split).

    Raises:
        InputError: it was made with another tokenizer, and would not be replaced in whole.
    """
    if not manifest.path.exists():
        return {}
    earlier = DomainManifest.load(manifest.path)
    found = {
        (domain, name): split
        for domain, splits in earlier.domains.items()
        for name, split in splits.items()
        if not replace or (domain, name) in named
    }
    known = earlier.tokenizer_checksum
    if known is None and earlier.tokenizer is not None and earlier.tokenizer.path is not None:
        known = earlier.tokenizer.checksum() if earlier.tokenizer.path.exists() else None
    same = (known, earlier.vocab_size, earlier.eod) == (
        manifest.tokenizer_checksum,
        manifest.vocab_size,
        manifest.eod,
    )
    if same:
        return found
    others = [f"{domain}:{name}" for domain, name in found if (domain, name) not in named]
    if others:
        raise InputError(
            f"{manifest.path} lists {', '.join(others[:5])}, made with another tokenizer; give "
            f"that one, give another --output, or drop what this run does not name with --replace"
        )
    return {}


def encode_all(
    jobs: Sequence[Job], encoding: Encoding, workers: int, shard: tuple[int, int]
) -> None:
    """Encode under a progress bar."""
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    total = sum(part.bytes for job in jobs for part in job.parts)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        encode(
            jobs, encoding, workers=workers, shard=shard, advance=partial(progress.advance, task)
        )


def clean_up(folder: Path, trained: Path | None) -> None:
    """Remove what no later start needs: the tokenizer just trained; another run's files stay."""
    if trained is not None:
        shutil.rmtree(trained.parent)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def print_shard(shard: tuple[int, int], jobs: Sequence[Job]) -> None:
    total = sum(len(job.parts) for job in jobs)
    ready = total - sum(len(job.missing()) for job in jobs)
    print(f"shard {shard[0]}/{shard[1]} is done; of all shards, {ready:,} of {total:,} parts are")


def print_table(manifest: DomainManifest, counts: Mapping[tuple[str, str], Counts]) -> None:
    title = f"{escape(str(manifest.path))}, vocabulary of {manifest.vocab_size:,}"
    table = Table("domain", "split", title=title)
    any_skipped = any(count.skipped for count in counts.values())
    skipped = ["skipped"] if any_skipped else []
    for heading in ("documents", "empty", *skipped, "tokens", "bytes/token"):
        table.add_column(heading, justify="right")
    for domain, splits in manifest.domains.items():
        for name, split in splits.items():
            count = counts.get((domain, name))
            table.add_row(
                domain,
                name,
                f"{split.documents:,}",
                f"{count.empty:,}" if count else "",
                *([f"{sum(count.skipped.values()):,}" if count else ""] if any_skipped else []),
                f"{split.tokens:,}",
                f"{count.text_bytes / count.tokens:.2f}" if count else "as before",
            )
    Console().print(table)
    for (domain, name), count in counts.items():
        for reason, number in count.skipped.items():
            print(
                f"warning: {domain}:{name}: {number:,} skipped, {reason}; the first: "
                f"{count.examples[reason]}",
                file=sys.stderr,
            )


def main(argv: Sequence[str]) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        preprocess(arguments)
    except OSError as error:  # a full disk, a folder that cannot be written to
        raise InputError(str(error)) from error
    return 0
