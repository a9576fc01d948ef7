"""Merges finished parts into one pair of files for each split, and writes the manifest."""

import dataclasses
import gc
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_tikmix.data.domains import DomainManifest, DomainSplit
from megatron_tikmix.data.token_files import TokenFiles
from megatron_tikmix.data.tokenizer import TokenizerFiles
from megatron_tikmix.errors import InputError
from megatron_tikmix.prepare.parts import Counts, Encoding, finished, import_indexed_dataset
from megatron_tikmix.prepare.pipeline import Job
from megatron_tikmix.prepare.sources import parse_named

Splits = dict[str, dict[str, DomainSplit]]


def merge(job: Job, encoding: Encoding) -> Counts:
    """Merge all parts of a job, in their order, into one pair, and delete them.

    Raises:
        InputError: parts are missing, or a file has no documents (with ``on_error: skip``: no
            file has any).
    """
    done = finished(job.merged)
    if done is not None:
        return done
    missing = job.missing()
    if missing:
        raise InputError(
            f"{job.source.domain}:{job.source.split}: {len(missing)} of {len(job.parts)} parts are "
            f"not there, the first being part {missing[0]}; run the missing shards, or run "
            f"without --shard and --merge"
        )
    counts = [finished(job.prefix(n)) or Counts() for n in range(len(job.parts))]
    total = sum(counts, Counts())
    _check_documents(job, counts, total, encoding)
    megatron = import_indexed_dataset()
    dtype = megatron.DType.optimal_dtype(encoding.vocab_size)
    filled = [job.prefix(n) for n, count in enumerate(counts) if count.documents]
    if len(filled) == 1:
        for suffix in ("bin", "idx"):
            part, merged = Path(f"{filled[0]}.{suffix}"), Path(f"{job.merged}.{suffix}")
            if part.exists() or not merged.exists():  # else an interrupted start has moved it
                os.replace(part, merged)
    else:
        builder = megatron.IndexedDatasetBuilder(f"{job.merged}.bin", dtype=dtype)
        gc.freeze()  # add_index collects garbage every time, which is slow with torch's objects
        for prefix in filled:
            builder.add_index(str(prefix))
        gc.unfreeze()
        builder.finalize(f"{job.merged}.idx")
    unfinished = Path(f"{job.merged}.tmp")
    unfinished.write_text(json.dumps(dataclasses.asdict(total)), encoding="utf-8")
    os.replace(unfinished, f"{job.merged}.json")
    for n in range(len(job.parts)):
        for suffix in ("bin", "idx", "json"):
            Path(f"{job.prefix(n)}.{suffix}").unlink(missing_ok=True)
    return total


def _check_documents(job: Job, counts: Sequence[Counts], total: Counts, encoding: Encoding) -> None:
    for path in job.source.files:
        documents = sum(
            count.documents
            for part, count in zip(job.parts, counts, strict=True)
            if part.path == path
        )
        if not documents and (encoding.on_error == "stop" or not total.documents):
            raise InputError(f"{path} has no documents with text; remove it, or add some")


def still_whole(split: DomainSplit | None, source_digest: str) -> bool:
    """Return whether a split was made from text and options of this digest, and is unchanged."""
    if split is None or split.source != source_digest:
        return False
    try:
        return TokenFiles.read(split.prefix, "").checksum() == split.checksum
    except InputError:
        return False


def adopt(values: Sequence[str], manifest: DomainManifest) -> Splits:
    """Return the splits that ``--adopt`` values name: existing pairs, which are not moved.

    Raises:
        InputError: a pair is missing or damaged, or was made with another tokenizer.
    """
    found: Splits = {}
    for value in values:
        named = parse_named("--adopt", value)
        if named is None:
            raise InputError(f"--adopt {value}: write DOMAIN:SPLIT=PREFIX")
        domain, split, prefix = named
        if split in found.get(domain, {}):
            raise InputError(f"--adopt {value}: {domain}:{split} is given twice; give it once")
        files = TokenFiles.read(Path(prefix), f"--adopt {value}")
        files.check_ids(manifest.vocab_size, "--tokenizer")
        found.setdefault(domain, {})[split] = DomainSplit(
            files.prefix, files.documents, files.tokens, files.checksum()
        )
    return found


def publish(
    manifest: DomainManifest,
    jobs: Mapping[Job, Counts],
    tokenizer: TokenizerFiles | None,
    kept: Splits,
    order: Sequence[tuple[str, str]],
) -> DomainManifest:
    """Move the merged pairs beside the manifest, and write the manifest last.

    After an interruption there is a manifest that lists only complete pairs, or none, and the same
    call continues.

    Args:
        manifest: gives the path, and the fields on the tokenizer.
        tokenizer: is copied beside the manifest, unless it is there already.
        kept: splits to be listed unchanged, whether or not they were listed before.
        order: (domain, split) of the splits to be listed first.
    """
    output = manifest.path.parent
    if jobs:  # meanwhile the manifest must not list pairs that are being replaced
        if kept and manifest.path.exists():
            replace(manifest, domains=kept).save()
        else:
            manifest.path.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer = tokenizer.copy_to(output)
    for job in jobs:
        for suffix in ("bin", "idx"):
            merged = Path(f"{job.merged}.{suffix}")
            if merged.exists():  # else an interrupted start has moved it
                os.replace(merged, output / f"{job.source.prefix}.{suffix}")
    found = {(d, s): split for d, splits in kept.items() for s, split in splits.items()}
    for job, counts in jobs.items():
        files = TokenFiles.read(output / job.source.prefix, str(manifest.path))
        if (files.documents, files.tokens) != (counts.documents, counts.tokens):
            raise InputError(
                f"{output / job.source.prefix}.idx has {files.documents} documents, and "
                f"{counts.documents} were written: does another run write there? start again"
            )
        found[job.source.domain, job.source.split] = DomainSplit(
            files.prefix, files.documents, files.tokens, files.checksum(), job.source_digest
        )
    domains: Splits = {}
    for domain, name in [*order, *found]:
        domains.setdefault(domain, {}).setdefault(name, found[domain, name])
    manifest = replace(manifest, domains=domains, tokenizer=tokenizer)
    manifest.save()
    for job in jobs:
        for folder in job.folders():
            shutil.rmtree(folder)
    return manifest
