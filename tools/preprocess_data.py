"""Turn JSONL text into the token files that Megatron trains on.

Every line of the input is one document, {"text": ...}. Every split of every domain becomes
OUTPUT/<domain>_<split>.bin and .idx: the documents' tokens, each document followed by the
end-of-document token. OUTPUT/domains.yaml, the manifest, names them all; training takes it as
data.manifest. OUTPUT/tokenizer.json is the tokenizer: one that you give, or a byte-level BPE
trained here on an equal share of every domain's train split.

Empty documents are skipped and counted. Outputs take their names only once all of them are
complete, the manifest last.
"""

import argparse
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tikmix.data.domains import DomainManifest, DomainSplit, check_name
from megatron_tikmix.errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-document token
BATCH_CHARACTERS = 1 << 18  # a worker's part of a batch; 100 bytes of memory a token

# A split's name holds no underscore, so that <domain>_<split> can be read in one way only.
SPLIT_NAME = r"[A-Za-z0-9.-]+"


@dataclass(frozen=True)
class Source:
    """The text of one split of one domain."""

    domain: str
    split: str
    files: tuple[Path, ...]

    @property
    def prefix(self) -> str:
        return f"{self.domain}_{self.split}"


@dataclass(frozen=True)
class Document:
    """A document, and the bytes that its line and its text take."""

    text: str
    line_bytes: int
    text_bytes: int


@dataclass(frozen=True)
class Counts:
    """What became of one source."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    text_bytes: int = 0


# Finding and reading text ------------------------------------------------------------------


def find_sources(inputs: Sequence[str]) -> list[Source]:
    """The sources that ``--input`` values name, in the order given; a folder's by name."""
    found: dict[tuple[str, str], list[Path]] = {}
    for value in inputs:
        named = re.fullmatch(r"([^:=/]+):([^:=/]+)=(.+)", value, re.DOTALL)
        if named:
            domain = check_name(named[1], f"--input {value}: domain")
            split = check_name(named[2], f"--input {value}: split", SPLIT_NAME)
            found.setdefault((domain, split), []).extend(_files(value, named[3]))
        else:
            for path in _jsonl_files(Path(value)):
                domain = check_name(path.parent.name, f"{path}: domain")
                split = check_name(path.stem, f"{path}: split", SPLIT_NAME)
                found.setdefault((domain, split), []).append(path)
    for (domain, split), files in found.items():
        for path, times in Counter(files).items():
            if times > 1:
                raise InputError(f"{path} is given twice for {domain}:{split}; give it once")
            if path.stat().st_size == 0:
                raise InputError(f"{path} is empty; remove it, or write its documents to it")
    return [Source(*key, tuple(files)) for key, files in found.items()]


def _files(value: str, pattern: str) -> list[Path]:
    paths = [Path(pattern)] if Path(pattern).exists() else sorted(map(Path, glob.glob(pattern)))
    if not paths:
        raise InputError(f"--input {value}: no such file, and no file matches the pattern")
    for path in paths:
        if not path.is_file():
            raise InputError(f"--input {value}: {path} is not a file; give files or a pattern")
    return paths


def _jsonl_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(
            f"--input {folder}: no such folder; give a folder, or DOMAIN:SPLIT=FILE for one file"
        )
    paths = sorted(folder.glob("[!.]*/[!.]*.jsonl"))
    if not paths:
        raise InputError(f"--input {folder}: no <domain>/<split>.jsonl file in it")
    return paths


def read_documents(path: Path, field: str) -> Iterator[Document]:
    """The documents of a JSONL file; blank lines are none.

    Raises:
        InputError: names the file and the line that is not what it must be.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(line, field, f"{path}: line {number}:")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _document(line: bytes, field: str, where: str) -> Document:
    try:
        content = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} invalid UTF-8 at its byte {error.start + 1}; convert the file to UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        problem = f"{error.msg.removesuffix(' at')} at its character {error.colno}"
        raise InputError(f"{where} malformed JSON: {problem}; write one object a line") from error
    except (ValueError, RecursionError) as error:  # nested too deep, or a number of 5,000 digits
        raise InputError(f"{where} unreadable JSON: {error}; simplify it") from error
    if not isinstance(content, dict):
        raise InputError(f"{where} not a JSON object; write {{{json.dumps(field)}: ...}}")
    if field not in content:
        raise InputError(
            f"{where} no field {field!r} among {', '.join(map(repr, content)) or 'none'}; "
            "name the field that holds the text with --text_field"
        )
    text = content[field]
    if not isinstance(text, str):
        kind = json.dumps(text)[:40]
        raise InputError(f"{where} field {field!r} must be a string, and is {kind}")
    try:
        return Document(text, len(line), len(text.encode()))
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} field {field!r} holds half a surrogate pair at character {error.start + 1}, "
            "which is not text; remove it"
        ) from error


# Tokenizers --------------------------------------------------------------------------------


def train_tokenizer(
    sources: Sequence[Source], field: str, vocab_size: int, max_characters: int
) -> Tokenizer:
    """A byte-level BPE: every text has tokens, and the tokens give back the same text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_sample(sources, field, max_characters), trainer)
    return tokenizer


def tokenizer_sample(sources: Sequence[Source], field: str, max_characters: int) -> Iterator[str]:
    """An equal share of every domain's train split, from the beginning of each of its files."""
    train = [source for source in sources if source.split == "train"]
    for source in train:
        for path in source.files:
            room = max_characters // len(train) // len(source.files)
            for document in read_documents(path, field):
                yield document.text[:room]
                room -= len(document.text)
                if room <= 0:
                    break


def load_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(f"--tokenizer {path}: no such file; give a Hugging Face tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(
            f"--tokenizer {path}: not a Hugging Face tokenizer.json: {error}"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_of_document(tokenizer: Tokenizer, token: str) -> int:
    eod = tokenizer.token_to_id(token)
    if eod is None:
        raise InputError(
            f"the tokenizer has no token {token!r}; name its end-of-document token with --eod_token"
        )
    return int(eod)


# Writing token files -----------------------------------------------------------------------


def import_indexed_dataset() -> Any:
    """megatron-core's module. Imported late: it takes seconds, and bad input is found before."""
    with warnings.catch_warnings(action="ignore"):  # on what a GPU would want installed
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def batches(documents: Iterator[Document], max_characters: int) -> Iterator[list[Document]]:
    """Consecutive documents, about `max_characters` at a time."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= max_characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class SplitWriter:
    """Encodes sources into ``.bin/.idx`` files in one folder."""

    def __init__(
        self, folder: Path, tokenizer: Tokenizer, eod: int, vocab_size: int, workers: int
    ) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.eod = eod
        self.megatron = import_indexed_dataset()
        self.dtype = self.megatron.DType.optimal_dtype(vocab_size)
        self.batch_characters = BATCH_CHARACTERS * workers
        # "<|endoftext|>" written out in a document is text, and does not end it.
        tokenizer.encode_special_tokens = True

    def write(self, source: Source, field: str, advance: Callable[[int], None]) -> Counts:
        """Write the source's files; every document is one item.

        `advance` is called with the number of input bytes done since it was last called.
        """
        prefix = self.folder / source.prefix
        builder = self.megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype)
        counts = Counts()
        for path in source.files:
            before = counts.documents
            for batch in batches(read_documents(path, field), self.batch_characters):
                counts = self._add(batch, builder, counts)
                advance(sum(document.line_bytes for document in batch))
            if counts.documents == before:
                raise InputError(f"{path} has no documents with text; remove it, or add some")
        builder.finalize(f"{prefix}.idx")
        return counts

    def _add(self, batch: list[Document], builder: Any, counts: Counts) -> Counts:
        # In parallel and outside the GIL; the result does not depend on the number of threads.
        encodings = self.tokenizer.encode_batch_fast(
            [document.text for document in batch], add_special_tokens=False
        )
        documents = tokens = 0
        for encoding in encodings:
            if ids := encoding.ids:
                builder.add_document(np.array([*ids, self.eod], dtype=self.dtype), [len(ids) + 1])
                documents += 1
                tokens += len(ids) + 1
        return Counts(
            documents=counts.documents + documents,
            empty=counts.empty + len(batch) - documents,
            tokens=counts.tokens + tokens,
            text_bytes=counts.text_bytes + sum(document.text_bytes for document in batch),
        )


# The command -------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="""\
examples:
  # a folder of <domain>/train.jsonl and <domain>/validation.jsonl, a new tokenizer
  python tools/preprocess_data.py --input data/corpus --output data/tokens \\
      --train_tokenizer --vocab_size 2048

  # files of your own, a tokenizer that exists
  python tools/preprocess_data.py --output data/tokens --tokenizer tokenizer.json \\
      --input 'web:train=shards/web-*.jsonl' --input web:validation=web-held-out.jsonl \\
      --input code:train=code.jsonl --text_field content
""",
    )
    add = parser.add_argument
    add(
        "--input",
        action="append",
        required=True,
        metavar="DIR | DOMAIN:SPLIT=FILE",
        help="a folder of <domain>/<split>.jsonl, or one split's file or quoted glob pattern; "
        "repeat for more",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    add(
        "--text_field",
        default="text",
        metavar="NAME",
        help="the field that holds a document's text (default: text)",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a Hugging Face tokenizer.json to use"
    )
    which.add_argument(
        "--train_tokenizer", action="store_true", help="train a byte-level BPE on the train splits"
    )
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
        default=END_OF_DOCUMENT,
        metavar="TOKEN",
        help=f"the end-of-document token of --tokenizer (default: {END_OF_DOCUMENT})",
    )
    add(
        "--workers",
        type=int,
        default=available_cpus(),
        metavar="N",
        help="encoding threads (default: one per CPU); the results are the same for any number",
    )
    return parser


def available_cpus() -> int:
    """CPUs this process may use, which a batch system can make fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def check(arguments: argparse.Namespace) -> None:
    """Fill in the default vocabulary; refuse what cannot work."""
    if arguments.workers < 1:
        raise InputError(f"--workers ({arguments.workers}) must be at least 1")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise InputError(f"--output {arguments.output} is a file; give a folder")
    if not arguments.train_tokenizer:
        if arguments.vocab_size is not None:
            raise InputError("--vocab_size is for --train_tokenizer; leave it out with --tokenizer")
        return
    if arguments.eod_token != END_OF_DOCUMENT:
        raise InputError("--eod_token is for --tokenizer; leave it out with --train_tokenizer")
    if arguments.vocab_size is None:
        arguments.vocab_size = 2048
    for name, least in (("vocab_size", SMALLEST_VOCABULARY), ("tokenizer_characters", 1)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name} ({getattr(arguments, name)}) must be at least {least}")


def preprocess(arguments: argparse.Namespace) -> None:
    check(arguments)
    sources = find_sources(arguments.input)
    if arguments.train_tokenizer and all(source.split != "train" for source in sources):
        raise InputError("--train_tokenizer: no domain has a train split; give one with --input")
    # Read when tokenizers first works in parallel.
    os.environ["RAYON_NUM_THREADS"] = str(arguments.workers)
    tokenizer = make_tokenizer(arguments, sources)
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    manifest = DomainManifest(
        path=arguments.output / "domains.yaml",
        tokenizer=arguments.output / "tokenizer.json",
        vocab_size=vocab_size,
        eod=end_of_document(tokenizer, arguments.eod_token),
        domains={},
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=arguments.output) as folder:
        unfinished = Path(folder)
        if arguments.train_tokenizer:
            tokenizer.save(str(unfinished / "tokenizer.json"))
        else:
            shutil.copyfile(arguments.tokenizer, unfinished / "tokenizer.json")
        writer = SplitWriter(unfinished, tokenizer, manifest.eod, vocab_size, arguments.workers)
        counts = write_all(writer, sources, arguments.text_field)
        manifest.path.unlink(missing_ok=True)  # from here on, an older one would be wrong
        for path in sorted(unfinished.iterdir()):
            os.replace(path, arguments.output / path.name)

    domains: dict[str, dict[str, DomainSplit]] = {}
    for source, count in counts.items():
        split = DomainSplit(arguments.output / source.prefix, count.documents, count.tokens)
        domains.setdefault(source.domain, {})[source.split] = split
    manifest = replace(manifest, domains=domains)
    manifest.save()
    print_table(manifest, counts)


def make_tokenizer(arguments: argparse.Namespace, sources: Sequence[Source]) -> Tokenizer:
    if not arguments.train_tokenizer:
        return load_tokenizer(arguments.tokenizer)
    with Console(stderr=True).status("training the tokenizer"):
        return train_tokenizer(
            sources, arguments.text_field, arguments.vocab_size, arguments.tokenizer_characters
        )


def write_all(writer: SplitWriter, sources: Sequence[Source], field: str) -> dict[Source, Counts]:
    """Write every source, under a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    total = sum(path.stat().st_size for source in sources for path in source.files)
    counts = {}
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        for source in sources:
            progress.update(task, description=f"{source.domain} {source.split}")
            counts[source] = writer.write(source, field, partial(progress.advance, task))
    return counts


def print_table(manifest: DomainManifest, counts: dict[Source, Counts]) -> None:
    title = f"{escape(str(manifest.path))}, vocabulary of {manifest.vocab_size:,}"
    table = Table("domain", "split", title=title)
    for heading in ("documents", "empty", "tokens", "bytes/token"):
        table.add_column(heading, justify="right")
    for source, count in counts.items():
        table.add_row(
            source.domain,
            source.split,
            f"{count.documents:,}",
            f"{count.empty:,}",
            f"{count.tokens:,}",
            f"{count.text_bytes / count.tokens:.2f}",
        )
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        preprocess(arguments)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
