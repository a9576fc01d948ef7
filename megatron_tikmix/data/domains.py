"""The domain manifest: which domains there are, in which files, and how large they are.

``tikmix preprocess`` writes it beside the ``.bin/.idx`` files; training reads it::

    tokenizer: tokenizer.json
    vocab_size: 2048
    eod: 0
    domains:
      python_code:
        train: {prefix: python_code_train, documents: 812, tokens: 1234567}
        validation: {prefix: python_code_validation, documents: 90, tokens: 130000}

Paths are relative to the manifest's folder, so that the folder can be moved.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_tikmix.data.token_files import AGAIN, TokenFiles
from megatron_tikmix.data.tokenizer import LIBRARIES, TokenizerFiles
from megatron_tikmix.errors import InputError


@dataclass(frozen=True)
class DomainSplit:
    """One split of one domain: ``<prefix>.bin`` and ``<prefix>.idx``."""

    prefix: Path
    documents: int
    tokens: int
    """Number of tokens, with end-of-document tokens."""

    checksum: str | None = None
    """:meth:`TokenFiles.checksum` of the pair (on disk `fingerprint`); None in old manifests."""

    source: str | None = None
    """A digest of the text and options from which the pair was made."""

    @property
    def bin_path(self) -> Path:
        return Path(f"{self.prefix}.bin")

    @property
    def idx_path(self) -> Path:
        return Path(f"{self.prefix}.idx")


@dataclass(frozen=True)
class DomainManifest:
    """Every domain's splits, and the tokenizer they were encoded with."""

    path: Path
    tokenizer: TokenizerFiles | None
    vocab_size: int
    eod: int
    domains: Mapping[str, Mapping[str, DomainSplit]]
    tokenizer_checksum: str | None = None
    """:meth:`TokenizerFiles.checksum` (on disk `tokenizer_fingerprint`); None in old manifests."""

    @classmethod
    def load(cls, path: str | Path) -> "DomainManifest":
        """Read a manifest.

        Raises:
            InputError: names the file and the field that is missing, unknown or ill-typed.
        """
        path = Path(path)
        kinds = {"tokenizer": str, "vocab_size": int, "eod": int, "domains": dict} | {
            "tokenizer_library": str,
            "tokenizer_fingerprint": str,
        }
        optional = {"tokenizer", "tokenizer_library", "tokenizer_fingerprint"}
        fields = _take(f"{path}:", _read_yaml(path), kinds, optional)
        vocab_size, eod = fields["vocab_size"], fields["eod"]
        if not 0 <= eod < vocab_size:
            raise InputError(
                f"{path}: eod ({eod}) must be a token id below vocab_size {vocab_size}"
            )
        if not fields["domains"]:
            raise InputError(f"{path}: domains must name at least one domain")
        file, library = fields["tokenizer"], fields["tokenizer_library"]
        if library is not None and library not in LIBRARIES:
            raise InputError(
                f"{path}: tokenizer_library must be one of {', '.join(LIBRARIES)}, and is {library}"
            )
        tokenizer = None
        if file is not None or library is not None:
            tokenizer = TokenizerFiles(None if file is None else path.parent / file, library)
        return cls(
            path=path,
            tokenizer=tokenizer,
            tokenizer_checksum=fields["tokenizer_fingerprint"],
            vocab_size=vocab_size,
            eod=eod,
            domains={
                name: _domain(path, name, splits) for name, splits in fields["domains"].items()
            },
        )

    def save(self) -> None:
        """Write the manifest to :attr:`path`, all of it or nothing."""
        tokenizer = self.tokenizer
        where = None if tokenizer is None or tokenizer.path is None else tokenizer.path
        known = {
            "tokenizer_library": None if tokenizer is None else tokenizer.library,
            "tokenizer_fingerprint": self.tokenizer_checksum,
        }
        content = {
            "tokenizer": None if where is None else self._relative(where),
            **{name: value for name, value in known.items() if value is not None},
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "domains": {
                domain: {name: self._split_content(split) for name, split in splits.items()}
                for domain, splits in self.domains.items()
            },
        }
        unfinished = self.path.with_name(f"{self.path.name}.tmp")
        with unfinished.open("w", encoding="utf-8") as file:
            yaml.safe_dump(content, file, sort_keys=False, default_flow_style=None, width=200)
        os.replace(unfinished, self.path)

    def _split_content(self, split: DomainSplit) -> dict[str, Any]:
        known = {"fingerprint": split.checksum, "source": split.source}
        return {
            "prefix": self._relative(split.prefix),
            "documents": split.documents,
            "tokens": split.tokens,
            **{name: value for name, value in known.items() if value is not None},
        }

    def _relative(self, path: Path) -> str:
        """Return `path` relative to the manifest's folder, or unchanged if it lies elsewhere."""
        folder = self.path.parent.absolute()
        absolute = path.absolute()
        return str(absolute.relative_to(folder) if absolute.is_relative_to(folder) else absolute)

    def split(self, domain: str, split: str) -> DomainSplit:
        """Return one split of one domain.

        Raises:
            InputError: there is none of that name; the message lists the names.
        """
        if domain not in self.domains:
            raise InputError(
                f"{self.path}: no domain named {domain!r}; it has {', '.join(self.domains)}"
            )
        splits = self.domains[domain]
        if split not in splits:
            raise InputError(
                f"{self.path}: domain {domain} has no {split!r} split; it has {', '.join(splits)}"
            )
        return splits[split]

    def check_tokenizer(self) -> None:
        """Check that the tokenizer, if its file exists, is the one that made the token files.

        Raises:
            InputError: its file was replaced.
        """
        tokenizer, known = self.tokenizer, self.tokenizer_checksum
        if tokenizer is None or known is None:
            return
        if tokenizer.path is not None and not tokenizer.path.exists():
            return  # only prompt tasks need it, and report that it is missing
        if tokenizer.checksum() != known:
            raise InputError(
                f"{tokenizer.path} is not the tokenizer that the token files of {self.path} were "
                f"made with; put that one back, or {AGAIN}"
            )

    def check_files(self, domains: Iterable[str], splits: Iterable[str]) -> None:
        """Check the files of these splits of these domains, without reading the tokens.

        Raises:
            InputError: a file is missing or truncated, or differs from what the manifest says.
        """
        splits = tuple(splits)
        for domain in domains:
            for name in splits:
                self._check_split(f"domains.{domain}.{name}", self.split(domain, name))

    def _check_split(self, field: str, split: DomainSplit) -> None:
        found = TokenFiles.read(split.prefix, str(self.path))
        for name in ("documents", "tokens"):
            listed, real = getattr(split, name), getattr(found, name)
            if listed != real:
                raise InputError(
                    f"{self.path}: {field}.{name} is {listed}, but {split.idx_path} says {real}; "
                    f"{AGAIN}"
                )
        if split.checksum is not None and found.checksum() != split.checksum:
            raise InputError(
                f"{split.bin_path} and {split.idx_path} are not the files that {self.path} lists "
                f"as {field}: their content was changed; {AGAIN}"
            )


def check_name(name: object, what: str, pattern: str = r"[A-Za-z0-9_.-]+") -> str:
    """Return `name` if it is fit for file names, TensorBoard tags and HTML.

    Raises:
        InputError: it is not; `what` says whose name it is.
    """
    if not isinstance(name, str) or re.fullmatch(pattern, name) is None:
        allowed = pattern.removeprefix("[").removesuffix("]+")
        raise InputError(f"{what} {name!r} must be a name made of the characters {allowed} only")
    return name


# Reading the manifest ----------------------------------------------------------------------


def _read_yaml(path: Path) -> object:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such domain manifest; write one with tikmix preprocess"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8; {AGAIN}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}:"
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise InputError(
            f"{path}:{line} not valid YAML: {problem}; correct it, or {AGAIN}"
        ) from error


def _domain(path: Path, name: object, splits: object) -> dict[str, DomainSplit]:
    name = check_name(name, f"{path}: domain")
    where = f"{path}: domains.{name}"
    if not isinstance(splits, dict) or not splits:
        raise InputError(f"{where} must map at least one split, such as train, to its files")
    return {
        check_name(key, f"{where}: split"): _split(path, where, key, splits[key]) for key in splits
    }


def _split(path: Path, where: str, name: str, content: object) -> DomainSplit:
    kinds = {"prefix": str, "documents": int, "tokens": int, "fingerprint": str, "source": str}
    fields = _take(f"{where}.{name}:", content, kinds, optional={"fingerprint", "source"})
    return DomainSplit(
        prefix=path.parent / fields["prefix"],
        documents=fields["documents"],
        tokens=fields["tokens"],
        checksum=fields["fingerprint"],
        source=fields["source"],
    )


def _take(
    where: str, content: object, kinds: Mapping[str, type], optional: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the fields of a mapping; refuse missing, unknown and mistyped ones."""
    words = {str: "text", int: "a whole number, 0 or more", dict: "a mapping"}
    expected = ", ".join(kinds)
    if not isinstance(content, dict):
        raise InputError(f"{where} must be a mapping with the fields {expected}")
    for name in content:
        if name not in kinds:
            raise InputError(f"{where} unknown field {name!r}; the fields are {expected}")
    for name, kind in kinds.items():
        value = content.get(name)
        if value is None and name in optional:
            continue
        if name not in content:
            raise InputError(f"{where} field {name} is missing; the fields are {expected}")
        # bool is a subclass of int, but never a valid number here.
        ill_typed = not isinstance(value, kind) or isinstance(value, bool)
        if ill_typed or (isinstance(value, int) and value < 0):
            raise InputError(f"{where} field {name} must be {words[kind]}, and is {value!r}")
    return {name: content.get(name) for name in kinds}
