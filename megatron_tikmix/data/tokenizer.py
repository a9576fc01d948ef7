"""Text to token ids, and back, by the tokenizer that a manifest names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from megatron_tikmix.errors import InputError


class TextTokenizer(Protocol):
    """What preprocessing and prompt/completion tasks ask of a tokenizer."""

    vocab_size: int
    """All ids are below it."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without any token that marks its beginning or end."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as ``<|endoftext|>``."""


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of Hugging Face ``tokenizers``; it encodes in threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()  # settings for serving, which would cut documents short
        tokenizer.no_padding()
        # "<|endoftext|>" written out in a document is text, and does not end it.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def token_id(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found


def load_tokenizer(path: Path, named_by: str) -> TextTokenizer:
    """The tokenizer in a file.

    Args:
        named_by: the option or field that names the file, for messages.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    if not path.is_file():
        raise InputError(f"{named_by} {path}: no such file; give a Hugging Face tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(
            f"{named_by} {path}: not a Hugging Face tokenizer.json: {error}"
        ) from error
    return HuggingFaceTokenizer(tokenizer)
