"""Tokenizers: the kinds that a manifest can name, behind one interface."""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from megatron_tikmix.errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"

LIBRARIES = ("huggingface", "sentencepiece", "tiktoken", "megatron", "byte-level")
"""megatron-core's names of tokenizer libraries, as in its tokenizer_metadata.json."""

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ckpt",
    ".ot",
)
"""Suffixes of large files in a model's folder that do not belong to its tokenizer."""


class TextTokenizer(Protocol):
    """The interface of a tokenizer, for preprocessing and prompt/completion tasks."""

    vocab_size: int
    """The number of token ids; all ids are below it."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without tokens that mark its beginning or end."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""

    def end_of_document(self, token: str | None) -> int:
        """Return the id of the end-of-document token `token`; None: the tokenizer's default.

        Raises:
            InputError: it has no such token.
        """


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk.

    Attributes:
        path: a ``tokenizer.json``; a folder of Hugging Face `transformers`, possibly of a whole
            model, whose weights and sub-folders are ignored; or with `library`, the file or folder
            that this library reads. None for ``byte-level``, which needs no file.
        library: one of :data:`LIBRARIES`, to be read by megatron-core's tokenizer classes. None for
            Hugging Face `tokenizers` and `transformers`, which are read directly.
    """

    path: Path | None
    library: str | None = None

    def load(self, named_by: str) -> TextTokenizer:
        """Load the tokenizer.

        Args:
            named_by: the option or field that names it, for messages.

        Raises:
            InputError: there is no such file, it is no tokenizer, or a package is missing.
        """
        where = f"{named_by} {self.path}"
        if self.path is not None and not self.path.exists():
            raise InputError(f"{where}: no such file; give a Hugging Face tokenizer.json")
        if self.library is not None:
            return _from_megatron(self.path, self.library, where)
        assert self.path is not None
        file = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        if file.is_file():
            return _from_tokenizers(file, where)
        return _from_transformers(self.path, where)

    def checksum(self) -> str:
        """Return the SHA-256 of the library's name and of the files' names and content."""
        digest = hashlib.sha256((self.library or "").encode())
        for path in self._files():
            # Without the name of the file or folder itself, which a copy may change.
            name = "" if path == self.path else path.name
            digest.update(f"\x00{name}\x00{path.stat().st_size}\x00".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()[:32]

    def copy_to(self, folder: Path) -> "TokenizerFiles":
        """Copy the tokenizer to `folder`, as ``tokenizer.json`` or a folder or file ``tokenizer``.

        An older copy is replaced; a tokenizer that is already in `folder` is not copied.
        """
        if self.path is None:
            return self
        given = self.path.absolute()
        if given.parent.resolve() == folder.resolve():
            return replace(self, path=folder / given.name)
        if self.path.is_dir():
            copy = folder / "tokenizer"
            self._copy_folder(copy)
        else:
            copy = folder / ("tokenizer.json" if self.library is None else self.path.name)
            unfinished = copy.with_name(f"{copy.name}.tmp")
            shutil.copyfile(self.path, unfinished)
            os.replace(unfinished, copy)
        return replace(self, path=copy)

    def _copy_folder(self, copy: Path) -> None:
        unfinished = copy.with_name(f"{copy.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        new = unfinished / "new"
        new.mkdir(parents=True)
        for path in self._files():
            shutil.copyfile(path, new / path.name)
        if copy.exists():  # a folder with files in it cannot be replaced in one step
            os.replace(copy, unfinished / "former")
        os.replace(new, copy)
        shutil.rmtree(unfinished)

    def _files(self) -> list[Path]:
        if self.path is None:
            return []
        if not self.path.is_dir():
            return [self.path]
        return sorted(
            path for path in self.path.iterdir() if path.is_file() and path.suffix not in WEIGHTS
        )


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` of Hugging Face ``tokenizers``; it encodes in threads."""

    def __init__(self, tokenizer: Tokenizer, eos: str | None = None) -> None:
        tokenizer.no_truncation()  # a setting for serving, which would cut documents short
        tokenizer.no_padding()
        # "<|endoftext|>" in a document's text is text, and does not end the document.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._eos = eos
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def end_of_document(self, token: str | None) -> int:
        name = token or self._eos or END_OF_DOCUMENT
        return _known(self._tokenizer.token_to_id(name), name)


class TransformersTokenizer:
    """A tokenizer of Hugging Face ``transformers`` that has no ``tokenizer.json``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text

    def end_of_document(self, token: str | None) -> int:
        name = token or self._tokenizer.eos_token or END_OF_DOCUMENT
        return _known(self._tokenizer.get_vocab().get(name), name)


class MegatronTokenizer:
    """One of megatron-core's tokenizer classes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = int(tokenizer.vocab_size)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.tokenize(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.detokenize(list(ids))
        return text

    def end_of_document(self, token: str | None) -> int:
        if token is None:
            return _known(self._tokenizer.eod, "of its own for the end of a document")
        try:
            vocabulary = self._tokenizer.vocab  # by token, or in the order of ids
            pairs = enumerate(vocabulary)
            known = vocabulary if isinstance(vocabulary, dict) else {name: i for i, name in pairs}
        except (AttributeError, NotImplementedError):  # bytes have no names
            known = {}
        return _known(known.get(token), token)


def _known(found: int | None, name: str) -> int:
    if found is None:
        raise InputError(
            f"the tokenizer has no token {name!r}; name its end-of-document token with --eod_token"
        )
    return int(found)


def _from_tokenizers(file: Path, where: str) -> TextTokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{where}: not a Hugging Face tokenizer.json: {error}") from error
    try:
        settings = json.loads((file.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
        eos = settings.get("eos_token")
        eos = eos.get("content") if isinstance(eos, dict) else eos
    except (OSError, ValueError):
        eos = None
    return HuggingFaceTokenizer(tokenizer, eos)


def _from_transformers(folder: Path, where: str) -> TextTokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise InputError(
            f"{where}: there is no tokenizer.json in it, and what else it may hold is read by "
            f"transformers; pip install transformers"
        ) from error
    try:
        return TransformersTokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:
        raise InputError(f"{where}: transformers cannot read it: {_first_line(error)}") from error


def _from_megatron(path: Path | None, library: str, where: str) -> TextTokenizer:
    from megatron.core.tokenizers import MegatronTokenizer as Loader

    try:
        loaded = Loader.from_pretrained(
            tokenizer_path=None if path is None else str(path), metadata_path={"library": library}
        )
    except Exception as error:
        raise InputError(
            f"{where}: megatron-core's {library} tokenizer cannot read it: {_first_line(error)}"
        ) from error
    return MegatronTokenizer(loaded)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
