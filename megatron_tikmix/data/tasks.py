"""Validation tasks: held-out tokens or prompts, cut into items that decide and that report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_tikmix.config import TaskConfig
from megatron_tikmix.data.completions import CompletionStream, halves, read_items
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.domains import DomainManifest, DomainSplit
from megatron_tikmix.data.samples import Sample, stack
from megatron_tikmix.data.token_files import TokenFiles
from megatron_tikmix.errors import InputError
from megatron_tikmix.seeds import derived_seed


class SampleStream(Protocol):
    """An endless stream of samples, the same `samples_per_epoch` of them again and again."""

    samples_per_epoch: int

    def __getitem__(self, k: int) -> Sample: ...

    def padding(self) -> Sample:
        """A sample that counts for nothing: its loss is masked throughout."""


@dataclass(frozen=True)
class Task:
    """A validation task.

    Attributes:
        decide: stream of the items whose gradient decides the next mixture.
        report: stream of the items whose loss is reported; no document, and no prompt, is in both.
        note: what the plan says of it, beside its name.
    """

    name: str
    decide: SampleStream
    report: SampleStream
    note: str = ""

    def bits_per_byte(self, loss: float, task_samples: int) -> float | None:
        """Of the first `task_samples` items that report; None where their bytes are not known.

        Args:
            loss: their mean loss per unmasked token, in nats.
        """
        if not isinstance(self.report, CompletionStream):
            return None
        return self.report.bits_per_byte(loss, task_samples)


def build_task(
    name: str,
    config: TaskConfig,
    manifest: DomainManifest,
    *,
    seed: int,
    sequence_length: int,
    scores_first_token: bool = True,
) -> Task:
    """The task that ``tasks.<name>`` describes.

    Args:
        scores_first_token: whether the loss on a document's first token counts. False with
            ``data.eod_mask_loss``, where completions without a prompt are refused.

    Raises:
        InputError: its data is missing, is damaged, was made with another tokenizer, or is too
            little to be cut into items that decide and items that report.
    """
    if config.prompts is not None:
        return _prompts(name, config, manifest, seed, sequence_length, scores_first_token)
    if config.domain is not None:
        split, source = manifest.split(config.domain, "validation"), config.domain
        what = f"the validation split of domain {config.domain}"
    else:
        assert config.prefix is not None
        field = f"tasks.{name}.prefix"
        files = TokenFiles.read(Path(config.prefix), field)
        files.check_ids(manifest.vocab_size, str(manifest.path))
        split, source = DomainSplit(files.prefix, files.documents, files.tokens), name
        what = f"{field} {config.prefix}"
    return _held_out(name, split, source, what, manifest, seed, sequence_length)


def _held_out(
    name: str,
    split: DomainSplit,
    source: str,
    what: str,
    manifest: DomainManifest,
    seed: int,
    sequence_length: int,
) -> Task:
    """The task on the documents of `split`, divided in two by `seed` and `source`."""
    tokens = IndexedDataset(str(split.prefix), multimodal=False, mmap=True)
    lengths = tokens.sequence_lengths.copy()  # its memory map closes with it
    order = np.random.default_rng(derived_seed(seed, "task", source)).permutation(len(lengths))
    # Halves of equal tokens, not documents: one long document must not empty a half.
    half = int(np.searchsorted(np.cumsum(lengths[order]), lengths.sum() / 2, side="right"))

    def stream(documents: np.ndarray, role: str) -> DomainStream:
        try:
            return DomainStream(
                f"{source}/{role}",
                split,
                seed=seed,
                sequence_length=sequence_length,
                eod=manifest.eod,
                vocab_size=manifest.vocab_size,
                documents=np.sort(documents),
            )
        except InputError as error:
            raise InputError(
                f"task {name}: {what} is too short to be cut into items that decide and items "
                f"that report ({error})"
            ) from error

    return Task(name, stream(order[:half], "decide"), stream(order[half:], "report"))


def _prompts(
    name: str,
    config: TaskConfig,
    manifest: DomainManifest,
    seed: int,
    sequence_length: int,
    scores_first_token: bool,
) -> Task:
    """The task on the completions of a JSONL file, its prompts divided in two by `seed`."""
    assert config.prompts is not None
    if manifest.tokenizer is None:
        raise InputError(
            f"tasks.{name}.prompts: {manifest.path} names no tokenizer to encode them with; give "
            f"it the field tokenizer, or tokenise the items and give them as prefix"
        )
    items = read_items(
        Path(config.prompts),
        f"tasks.{name}",
        prompt_field=config.prompt_field,
        completion_field=config.completion_field,
        tokenizer=manifest.tokenizer.load(f"{manifest.path}: tokenizer"),
        vocab_size=manifest.vocab_size,
        eod=manifest.eod,
        sequence_length=sequence_length,
        needs_prompt=not scores_first_token,
    )
    decide, report = (
        CompletionStream(half, sequence_length=sequence_length, eod=manifest.eod)
        for half in halves(items, derived_seed(seed, "task", name))
    )
    note = f"{len(items):,} prompts"
    for part in ("prompt", "completion"):
        cut = sum(part in item.cut for item in items)
        if cut:
            note += f", {cut:,} with the {part} cut to data.sequence_length {sequence_length}"
    return Task(name, decide, report, note)


def micro_batches(
    stream: SampleStream,
    samples: range,
    *,
    micro_batch_size: int,
    rank: int,
    size: int,
    multiple: int = 1,
) -> list[Sample]:
    """Data-parallel rank `rank`'s micro-batches of the stream's `samples`.

    Every rank gets the same number of full micro-batches, a multiple of `multiple`; what is
    missing is padded with samples whose loss is masked, so sums over tokens are the same for
    every layout.
    """
    group = micro_batch_size * size
    groups = -(-len(samples) // (group * multiple)) * multiple
    batches = []
    for index in range(groups):
        first = index * group + rank * micro_batch_size
        places = range(first, first + micro_batch_size)
        batches.append(
            stack([stream[samples[p]] if p < len(samples) else stream.padding() for p in places])
        )
    return batches
