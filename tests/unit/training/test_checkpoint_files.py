"""Checkpoint folders without a job: what is whole, what comes next, and what is deleted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tikmix.training.checkpoint_files import (
    RECORD,
    CheckpointFolder,
    damage,
    sizes_and_digests,
)


def write(files: CheckpointFolder, iteration: int) -> Path:
    path = files.begin(iteration)
    (path / RECORD).write_text(json.dumps({"iteration": iteration, "fingerprint": {}}))
    (path / "__0_0.distcp").write_bytes(bytes(range(256)) * 20)
    manifest = sizes_and_digests(path, ["__0_0.distcp", RECORD])
    return files.complete(path, iteration, manifest)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["__0_0.distcp", RECORD, "manifest.json"])
@pytest.mark.parametrize("harm", [flip_a_bit, truncate, Path.unlink])
def test_every_damage_is_found_and_named(
    name: str, harm: Callable[[Path], None], tmp_path: Path
) -> None:
    path = write(CheckpointFolder(tmp_path), 40)
    assert damage(path) is None
    if name == "manifest.json" and harm is Path.unlink:
        pytest.skip("a checkpoint of a version that wrote none")
    harm(path / name)
    found = [damage(path, share, 3) for share in range(3)]
    assert any(problem is not None and "iter_0000040" in problem for problem in found)
    if name == "__0_0.distcp":
        assert any(problem is not None and str(path / name) in problem for problem in found)


def test_a_killed_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    write(files, 20)
    (files.begin(40) / RECORD).write_text("{}")
    assert files.newest_first() == [20]
    write(files, 60)
    assert files.newest_first() == [60, 20]
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize(("pointer", "order"), [("60", [60, 40, 20]), ("7x", [80, 60, 40, 20])])
def test_what_a_run_goes_on_from(pointer: str, order: list[int], tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    assert files.newest_first() == []
    for iteration in (20, 40, 60, 80):
        write(files, iteration)
    files.pointer.write_text(pointer)
    assert files.newest_first() == order
    files.pointer.unlink()
    assert files.newest_first() == [80, 60, 40, 20]


def test_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    files = CheckpointFolder(tmp_path)
    for iteration in range(10, 90, 10):
        write(files, iteration)
    assert files.prune(upto=70, keep=2, keep_every=30) == [10, 20, 40, 50]
    assert files.iterations() == [30, 60, 70, 80]


def test_a_deletion_that_is_interrupted_leaves_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = CheckpointFolder(tmp_path)
    for iteration in (1, 2):
        path = files.begin(iteration)
        (path / RECORD).write_text("{}")
        files.complete(path, iteration, sizes_and_digests(path, [RECORD]))

    def interrupted(path: Path) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(OSError, match="busy"):
            files.prune(upto=2, keep=1)
    assert files.iterations() == [2]
    files.begin(3)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [
        "iter_0000002",
        "iter_0000003.unfinished",
    ]
