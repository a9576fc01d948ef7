"""Validation tasks: held-out tokens, or prompts with completions, on which the loss counts.

Each is divided into deciding items, on which mixtures are chosen, and reporting items.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from numpy.typing import NDArray

from megatron_tikmix.config import TaskConfig
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.domains import DomainManifest, DomainSplit
from megatron_tikmix.data.token_files import TokenFiles
from megatron_tikmix.data.tokenizer import TextTokenizer
from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import Line, parse_object, read_lines, text_of
from megatron_tikmix.megatron.samples import Sample, stack
from megatron_tikmix.seeds import derived_seed

_AT_ONCE = 1024  # items that are tokenised together


@dataclass(frozen=True)
class Item:
    """A prompt with its completion, cut to the length of a sample.

    Attributes:
        ids: token ids, int32, at most sequence_length + 1, with the completion at the end.
        completion: the number of ids that belong to the completion; at least one does not.
        bytes: the length of the completion in UTF-8.
        group: a number that items with the same prompt share.
        cut: those of ``prompt`` and ``completion`` that did not fit.
    """

    ids: NDArray[np.int32]
    completion: int
    bytes: int
    group: int
    cut: tuple[str, ...]


def read_items(
    path: Path,
    task: str,
    *,
    prompt_field: str,
    completion_field: str,
    tokenizer: TextTokenizer,
    vocab_size: int,
    eod: int,
    sequence_length: int,
    needs_prompt: bool = False,
) -> list[Item]:
    """Read the items of a JSONL file, plain or compressed, one object a line.

    The end-of-document token precedes every prompt, as it precedes every document in training.
    Prompt and completion are tokenised separately, so that no token spans both and the completion's
    bytes are known. Blanks at the end of the prompt are first moved to the beginning of the
    completion, where tokenizers expect them.

    Args:
        task: the field of the configuration that names the file, for messages.
        needs_prompt: refuse completions without a prompt.

    Raises:
        InputError: names the file, the line and what is wrong there.
    """
    if not path.is_file():
        raise InputError(f"{task}.prompts: {path}: no such file")
    items: list[Item] = []
    groups: dict[str, int] = {}
    for batch in _batches(path, task, prompt_field, completion_field):
        prompts = tokenizer.encode([prompt for _, prompt, _ in batch])
        completions = tokenizer.encode([completion for _, _, completion in batch])
        for (where, prompt, text), before, after in zip(batch, prompts, completions, strict=True):
            if not after:
                raise InputError(f"{where} field {completion_field!r} has no text; leave it out")
            if max(*before, *after, 0) >= vocab_size:
                raise InputError(
                    f"{where} a token has id {max(*before, *after)}, and the manifest has a "
                    f"vocabulary of {vocab_size}: its tokenizer is another; preprocess the data "
                    f"again with this one"
                )
            if needs_prompt and not before:
                raise InputError(
                    f"{where} field {prompt_field!r} is empty, and with data.eod_mask_loss what "
                    f"follows the end of a document does not count; give it a prompt"
                )
            group = groups.setdefault(prompt, len(groups))
            items.append(_item([eod, *before], after, text, group, tokenizer, sequence_length))
    if len(groups) < 2:
        raise InputError(
            f"{task}.prompts: {path} has {len(groups)} different prompts, and at least 2 are "
            f"needed: some items decide, and others report"
        )
    return items


def _batches(
    path: Path, task: str, prompt_field: str, completion_field: str
) -> Iterator[list[tuple[Line, str, str]]]:
    """Yield batches of (line, prompt, completion)."""
    batch: list[tuple[Line, str, str]] = []
    example = f'{{"{prompt_field}": ..., "{completion_field}": ...}}'
    for line in read_lines(path):
        content = parse_object(line, example)
        prompt = text_of(content, prompt_field, line, f"{task}.prompt_field")
        completion = text_of(content, completion_field, line, f"{task}.completion_field")
        stripped = prompt.rstrip()
        batch.append((line, stripped, prompt[len(stripped) :] + completion))
        if len(batch) == _AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _item(
    context: list[int],
    completion: list[int],
    text: str,
    group: int,
    tokenizer: TextTokenizer,
    sequence_length: int,
) -> Item:
    cut: list[str] = []
    if len(completion) > sequence_length:
        cut.append("completion")
        completion = completion[:sequence_length]
        text = tokenizer.decode(completion)
    room = sequence_length + 1 - len(completion)
    if len(context) > room:
        cut.append("prompt")
        context = context[-room:]
    return Item(
        ids=np.array([*context, *completion], dtype=np.int32),
        completion=len(completion),
        bytes=len(text.encode()),
        group=group,
        cut=tuple(cut),
    )


def halves(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Divide items into two halves of about equal completion tokens, at random by `seed`.

    Items with the same prompt, such as the choices of one question, are in the same half.
    """
    lengths = np.bincount(
        [item.group for item in items], weights=[item.completion for item in items]
    )
    order = np.random.default_rng(seed).permutation(len(lengths))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    half = int(np.searchsorted(np.cumsum(lengths[order]), lengths.sum() / 2, side="right"))
    half = min(max(half, 1), len(order) - 1)
    ordered = sorted(items, key=lambda item: int(place[item.group]))
    first = [item for item in ordered if place[item.group] < half]
    return first, ordered[len(first) :]


class CompletionStream:
    """Items as samples of `sequence_length` tokens.

    A sample begins with the item and is filled up with end-of-document tokens, which the item's
    tokens cannot attend to. The loss counts where the label is one of the completion's tokens.
    """

    def __init__(self, items: Sequence[Item], *, sequence_length: int, eod: int) -> None:
        self._items = items
        self._length = sequence_length
        self._eod = eod
        self.samples_per_epoch = len(items)

    def __getitem__(self, k: int) -> Sample:
        item = self._items[k % len(self._items)]
        n = len(item.ids)
        text = torch.full((self._length + 1,), self._eod, dtype=torch.int64)
        text[:n] = torch.from_numpy(item.ids)
        loss_mask = torch.zeros(self._length)
        loss_mask[n - 1 - item.completion : n - 1] = 1.0
        return {
            "tokens": text[:-1].clone(),
            "labels": text[1:].clone(),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self._length),
        }

    def padding(self) -> Sample:
        """Return a sample whose loss is masked throughout, to fill a micro-batch."""
        sample = self[0]
        sample["loss_mask"] = torch.zeros_like(sample["loss_mask"])
        return sample

    def bits_per_byte(self, loss: float, samples: int) -> float:
        """Return the bits per byte of the first `samples` completions.

        Args:
            loss: their mean loss in nats per token.
        """
        measured = self._items[:samples]
        tokens = sum(item.completion for item in measured)
        return loss * tokens / (math.log(2) * sum(item.bytes for item in measured))


class SampleStream(Protocol):
    """The interface of an endless stream that repeats its `samples_per_epoch` samples."""

    samples_per_epoch: int

    def __getitem__(self, k: int) -> Sample: ...

    def padding(self) -> Sample:
        """Return a sample whose loss is masked throughout, to fill a micro-batch."""


@dataclass(frozen=True)
class Task:
    """A validation task.

    Attributes:
        decide: stream of the deciding items, whose gradient is measured.
        report: stream of the reporting items; no document, and no prompt, is in both.
        note: a remark for the plan, beside the task's name.
    """

    name: str
    decide: SampleStream
    report: SampleStream
    note: str = ""

    def bits_per_byte(self, loss: float, task_samples: int) -> float | None:
        """Return the bits per byte of the first `task_samples` reporting items; None if unknown.

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
    """Build the task that ``tasks.<name>`` describes.

    Args:
        scores_first_token: whether the loss on a document's first token counts. False with
            ``data.eod_mask_loss``, where completions without a prompt are refused.

    Raises:
        InputError: its data is missing or damaged, was made with another tokenizer, or is too
            little to be divided into deciding and reporting items.
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
    """Build a task from the documents of `split`, divided in two by `seed` and `source`."""
    tokens = IndexedDataset(str(split.prefix), multimodal=False, mmap=True)
    lengths = tokens.sequence_lengths.copy()  # a view dies with the file's memory map
    order = np.random.default_rng(derived_seed(seed, "task", source)).permutation(len(lengths))
    # Halves have equal tokens, not documents, so that one long document leaves enough for both.
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
    """Build a task from the completions of a JSONL file, its prompts divided in two by `seed`."""
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
    """Return data-parallel rank `rank`'s micro-batches of the stream's `samples`.

    Every rank gets the same number of full micro-batches, a multiple of `multiple`. They are filled
    up with samples whose loss is masked, so sums over tokens are the same for every layout.
    """
    group = micro_batch_size * size
    groups = -(-len(samples) // (group * multiple)) * multiple
    batches = []
    for index in range(groups):
        first = index * group + rank * micro_batch_size
        places = range(first, first + micro_batch_size)
        chosen = [stream[samples[p]] if p < len(samples) else stream.padding() for p in places]
        batch = stack(chosen)
        if torch.cuda.is_available():  # the host need not wait for what is copied from there
            batch = {name: values.pin_memory() for name, values in batch.items()}
        batches.append(batch)
    return batches
