"""The files of a run's checkpoints: which exist, whether they are undamaged, which to delete.

::

    checkpoints/
      latest_checkpointed_iteration.txt   replaced last, once everything else is on disk
      iter_0000080/                       renamed to this when it is complete
        __0_0.distcp, .metadata, ...      megatron-core's shards
        tikmix.json                       iteration, consumed_samples, schedule, ledger
        manifest.json                     size and SHA-256 of every file above
      iter_0000120.unfinished/            being written, or left by a killed save

This module needs neither torch nor process groups.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tikmix.errors import InputError

LATEST = "latest_checkpointed_iteration.txt"
RECORD = "tikmix.json"
MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"

Manifest = dict[str, dict[str, Any]]
"""``{file: {"bytes": size, "sha256": hexadecimal digest}}``."""


class CheckpointFolder:
    """The folder with the checkpoints of one run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.pointer = self.folder / LATEST

    def path(self, iteration: int) -> Path:
        """Return the path of the checkpoint of `iteration`, whether or not it exists."""
        return self.folder / f"iter_{iteration:07d}"

    def iterations(self) -> list[int]:
        """Return the iterations of all complete checkpoints, ascending."""
        names = (path.parent.name for path in self.folder.glob(f"iter_*/{RECORD}"))
        numbers = (name.removeprefix("iter_") for name in names)
        return sorted(int(number) for number in numbers if number.isdigit())

    def newest_first(self) -> list[int]:
        """Return the iterations to resume from, in order of preference: the latest first.

        Checkpoints beyond the latest are left out; without a readable pointer none are.
        """
        complete = self.iterations()[::-1]
        try:
            latest = int(self.pointer.read_text())
        except (OSError, ValueError):
            return complete
        return [latest, *(iteration for iteration in complete if iteration < latest)]

    def begin(self, iteration: int) -> Path:
        """Make an empty folder for a new checkpoint, and remove what interrupted saves left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f"iter_*{_UNFINISHED}"):
            shutil.rmtree(left)
        path = self.path(iteration).with_name(self.path(iteration).name + _UNFINISHED)
        path.mkdir()
        return path

    def complete(self, unfinished: Path, iteration: int, manifest: Manifest) -> Path:
        """Rename the written folder to its final name, and make it the latest checkpoint."""
        write_whole(unfinished / MANIFEST, json.dumps({"files": manifest}, indent=1))
        path = self.path(iteration)
        if path.exists():  # the run was resumed from an earlier checkpoint
            self._delete(path)
        _sync_folder(unfinished)
        os.replace(unfinished, path)
        _sync_folder(self.folder)
        write_whole(self.pointer, f"{iteration}\n")
        return path

    def prune(self, upto: int, keep: int, keep_every: int | None = None) -> list[int]:
        """Delete all but the newest `keep` and those of iterations divisible by `keep_every`.

        Checkpoints beyond iteration `upto` stay: they exist if the run was resumed from an earlier
        one.

        Returns:
            the iterations of the deleted checkpoints.
        """
        old = [iteration for iteration in self.iterations() if iteration <= upto][:-keep]
        gone = [n for n in old if keep_every is None or n % keep_every != 0]
        for iteration in gone:
            self._delete(self.path(iteration))
        return gone

    @staticmethod
    def _delete(path: Path) -> None:
        """Delete a checkpoint, renaming it first: the next save removes what is left of it."""
        going = path.with_name(f"{path.name}.deleted{_UNFINISHED}")
        os.replace(path, going)
        shutil.rmtree(going)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's record: iteration, schedule, ledger, fingerprint and more.

    Raises:
        InputError: it cannot be read.
    """
    path = checkpoint / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["fingerprint"], dict):
            raise TypeError("its fingerprint is no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return dict(record)


def sizes_and_digests(checkpoint: Path, names: Sequence[str]) -> Manifest:
    """Return the size and digest of these files, after syncing each to the disk."""
    return {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": _digest(checkpoint / name)}
        for name in names
    }


def read_manifest(checkpoint: Path) -> Manifest | None:
    """Return size and digest of each file; None where an early version wrote no manifest.

    Raises:
        InputError: it cannot be read.
    """
    path = checkpoint / MANIFEST
    if not path.exists():
        return None
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text())["files"]
        return {
            name: {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])}
            for name, file in files.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def damage(checkpoint: Path, share: int = 0, shares: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None if it is undamaged.

    Args:
        share, shares: check only share number `share`, from 0, of `shares` equal shares of the
            files, so that ranks can divide them; the record belongs to the first share.
    """
    try:
        manifest = read_manifest(checkpoint)
        if share == 0:
            read_record(checkpoint)
    except InputError as error:
        return str(error)
    of_share = sorted((manifest or {}).items())[share::shares]
    problems = (_damage_of(checkpoint / name, written) for name, written in of_share)
    return next((problem for problem in problems if problem is not None), None)


def _damage_of(path: Path, written: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != written["bytes"]:
        return f"{path} has {size} bytes and was written with {written['bytes']}"
    try:
        if _digest(path) != written["sha256"]:
            return f"{path} does not have the checksum that it was written with"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, all of it or nothing, and sync it to the disk."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    _sync_folder(path.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
