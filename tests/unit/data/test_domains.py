"""The domain manifest: round trips, and a sentence for everything that can be wrong in it."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_tikmix.data.domains import DomainManifest, DomainSplit
from megatron_tikmix.data.tokenizer import TokenizerFiles
from megatron_tikmix.errors import InputError

LENGTHS = [3, 1, 7, 5]

GOOD = {
    "tokenizer": "tokenizer.json",
    "vocab_size": 100,
    "eod": 0,
    "domains": {"code": {"train": {"prefix": "code_train", "documents": 4, "tokens": 16}}},
}


def write_manifest(folder: Path, content: object) -> Path:
    path = folder / "domains.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def without(*keys: str) -> dict:
    return changed(*keys, remove=True)


def changed(*keys: str, value: object = None, remove: bool = False) -> dict:
    """GOOD with the field at `keys` set to `value`, or removed."""
    content = yaml.safe_load(yaml.safe_dump(GOOD))
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    if remove:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    return content


# Load and save -----------------------------------------------------------------------------


def test_load(tmp_path):
    manifest = DomainManifest.load(write_manifest(tmp_path, GOOD))
    assert manifest.tokenizer == TokenizerFiles(tmp_path / "tokenizer.json")
    assert (manifest.vocab_size, manifest.eod) == (100, 0)
    split = manifest.split("code", "train")
    assert split == DomainSplit(tmp_path / "code_train", documents=4, tokens=16)
    assert split.bin_path == tmp_path / "code_train.bin"
    assert split.idx_path == tmp_path / "code_train.idx"


@pytest.mark.parametrize("content", [without("tokenizer"), changed("tokenizer")])
def test_tokenizer_may_be_absent(tmp_path, content):
    assert DomainManifest.load(write_manifest(tmp_path, content)).tokenizer is None


@pytest.mark.parametrize("where", ["", "elsewhere"])
def test_save_and_load_give_the_same(tmp_path, where):
    folder = tmp_path / where
    folder.mkdir(exist_ok=True)
    manifest = DomainManifest(
        path=tmp_path / "domains.yaml",
        tokenizer=TokenizerFiles(folder / "tokenizer.json"),
        vocab_size=10,
        eod=9,
        domains={
            name: {"train": DomainSplit(folder / f"{name}_train", 1, 2)}
            for name in ("b.c-d", "a", "1", "null")
        },
    )
    manifest.save()
    loaded = DomainManifest.load(manifest.path)
    assert loaded == manifest
    assert list(loaded.domains) == list(manifest.domains)
    assert not list(tmp_path.glob("*.tmp"))


def test_saved_folder_can_be_moved(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    manifest = DomainManifest.load(write_manifest(old, GOOD))
    manifest.save()
    old.rename(new)
    assert DomainManifest.load(new / "domains.yaml").split("code", "train").prefix == (
        new / "code_train"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], ": must be a mapping with the fields tokenizer, vocab_size, eod, domains"),
        (without("eod"), ": field eod is missing"),
        (without("domains"), ": field domains is missing"),
        (changed("eos", value=1), ": unknown field 'eos'; the fields are tokenizer, vocab_size"),
        (changed("vocab_size", value="many"), ": field vocab_size must be a whole number"),
        (changed("vocab_size", value=True), ": field vocab_size must be a whole number"),
        (changed("vocab_size", value=None), ": field vocab_size must be a whole number"),
        (changed("tokenizer", value=3), ": field tokenizer must be text, and is 3"),
        (changed("eod", value=100), ": eod (100) must be a token id below vocab_size 100"),
        (changed("domains", value={}), ": domains must name at least one domain"),
        (changed("domains", value=["code"]), ": field domains must be a mapping"),
        (changed("domains", "a/b", value={}), ": domain 'a/b' must be a name made of"),
        (changed("domains", "ünï", value={}), ": domain 'ünï' must be a name made of"),
        (changed("domains", "a\n", value={}), ": domain 'a\\n' must be a name made of"),
        (changed("domains", 7, value={}), ": domain 7 must be a name made of"),
        (changed("domains", "code", value={}), ": domains.code must map at least one split"),
        (changed("domains", "code", "train", value=3), ": domains.code.train: must be a mapping"),
        (
            without("domains", "code", "train", "tokens"),
            ": domains.code.train: field tokens is missing",
        ),
        (
            changed("domains", "code", "train", "tokens", value=-1),
            ": domains.code.train: field tokens must be a whole number, 0 or more, and is -1",
        ),
        (
            changed("domains", "code", "train", "prefix", value=None),
            ": domains.code.train: field prefix must be text, and is None",
        ),
        (
            changed("domains", "code", "train", "weight", value=1),
            ": domains.code.train: unknown field 'weight'",
        ),
        ("eod: 0\ndomains: {", ": line 2: not valid YAML"),
    ],
)
def test_refusals_name_file_and_field(tmp_path, content, message):
    path = write_manifest(tmp_path, content)
    with pytest.raises(InputError, match=re.escape(f"{path}{message}")):
        DomainManifest.load(path)


def test_refuses_a_missing_manifest_and_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "domains.yaml"
    with pytest.raises(
        InputError, match="no such domain manifest; write one with tikmix preprocess"
    ):
        DomainManifest.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid UTF-8"):
        DomainManifest.load(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        DomainManifest.load(tmp_path)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_read_or_refused_in_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "domains.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        DomainManifest.load(path)


def test_unknown_names_are_refused_with_the_known(tmp_path):
    manifest = DomainManifest.load(write_manifest(tmp_path, GOOD))
    with pytest.raises(InputError, match="no domain named 'cod'; it has code"):
        manifest.split("cod", "train")
    with pytest.raises(InputError, match="domain code has no 'test' split; it has train"):
        manifest.check_files(["code"], ["test"])


# Checking files ----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def megatron():
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture(params=["uint16", "int32"])
def manifest(tmp_path, megatron, request):
    """A manifest whose files megatron-core's own builder wrote."""
    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "code_train.bin"), dtype=getattr(np, request.param)
    )
    for length in LENGTHS:
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(tmp_path / "code_train.idx"))
    return DomainManifest.load(write_manifest(tmp_path, GOOD))


def check(manifest: DomainManifest) -> None:
    manifest.check_files(["code"], ["train"])


def test_sound_files_pass(manifest):
    check(manifest)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_file(manifest, suffix):
    path = Path(f"{manifest.split('code', 'train').prefix}.{suffix}")
    path.unlink()
    with pytest.raises(InputError, match=re.escape(f"{path} is missing, and {manifest.path}")):
        check(manifest)


@pytest.mark.parametrize(("change", "said"), [(-3, "3 bytes shorter"), (2, "2 bytes longer")])
def test_bin_of_another_size(manifest, change, said):
    path = manifest.split("code", "train").bin_path
    os.truncate(path, path.stat().st_size + change)
    with pytest.raises(InputError) as refusal:
        check(manifest)
    assert str(refusal.value) == (
        f"{path} is {said} than its .idx says; run tikmix preprocess again"
    )


def test_idx_of_any_shorter_length_is_refused(manifest):
    path = manifest.split("code", "train").idx_path
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=re.escape(str(path))):
            check(manifest)
    path.write_bytes(whole)
    check(manifest)


def test_idx_with_another_magic(manifest):
    path = manifest.split("code", "train").idx_path
    path.write_bytes(b"NOTMIDX\x00\x00" + path.read_bytes()[9:])
    with pytest.raises(InputError, match="is not a Megatron index"):
        check(manifest)


@pytest.mark.parametrize(("position", "said"), [(9, "version 77"), (17, "token type 77")])
def test_idx_of_another_form(manifest, position, said):
    path = manifest.split("code", "train").idx_path
    content = bytearray(path.read_bytes())
    content[position] = 77
    path.write_bytes(content)
    with pytest.raises(InputError, match=said):
        check(manifest)


def test_idx_whose_last_bound_is_wrong(manifest):
    path = manifest.split("code", "train").idx_path
    content = bytearray(path.read_bytes())
    content[-8] += 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(f"{path} contradicts itself")):
        check(manifest)


def test_idx_without_documents(tmp_path, megatron):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "code_train.bin"))
    builder.finalize(str(tmp_path / "code_train.idx"))
    with pytest.raises(InputError, match="holds no documents"):
        check(DomainManifest.load(write_manifest(tmp_path, GOOD)))


@pytest.mark.parametrize(("field", "found"), [("documents", 4), ("tokens", 16)])
def test_manifest_that_does_not_fit_the_files(manifest, field, found):
    content = changed("domains", "code", "train", field, value=99)
    other = DomainManifest.load(write_manifest(manifest.path.parent, content))
    said = f"domains.code.train.{field} is 99, but .*idx says {found}; run tikmix preprocess"
    with pytest.raises(InputError, match=said):
        check(other)
