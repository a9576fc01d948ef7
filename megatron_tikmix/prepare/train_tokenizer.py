"""Trains a byte-level BPE tokenizer on the text to be preprocessed."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_tikmix.data.tokenizer import END_OF_DOCUMENT, TokenizerFiles
from megatron_tikmix.prepare.readers import Document, Part, Reading, documents
from megatron_tikmix.prepare.sources import Source

SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-document token


def train_tokenizer(
    sources: Sequence[Source],
    reading: Reading,
    *,
    vocab_size: int,
    max_characters: int,
    skip_bad: bool,
    folder: Path,
) -> TokenizerFiles:
    """Train a tokenizer and save it in `folder`; it can encode any text, and decode it unchanged.

    Raises:
        BadDocument: a document is bad, unless `skip_bad`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = sample(sources, reading, max_characters, skip_bad)
    tokenizer.train_from_iterator(texts, trainer)
    content = tokenizer.to_str(pretty=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    path = folder / f"tokenizer-{digest}" / "tokenizer.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return TokenizerFiles(path)


def sample(
    sources: Sequence[Source], reading: Reading, max_characters: int, skip_bad: bool
) -> Iterator[str]:
    """Yield text, an equal share of every domain's train split, from the start of each file."""
    train = [source for source in sources if source.split == "train"]
    for source in train:
        for path in source.files:
            room = max_characters // len(train) // len(source.files)
            for text in _texts(path, reading, skip_bad):
                yield text[:room]
                room -= len(text)
                if room <= 0:
                    break


def _texts(path: Path, reading: Reading, skip_bad: bool) -> Iterator[str]:
    for document in documents(Part(path, 0, None, 0), reading):
        if isinstance(document, Document):
            yield document.text
        elif not skip_bad:
            raise document
