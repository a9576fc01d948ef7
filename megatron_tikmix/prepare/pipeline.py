"""Encodes the parts of all sources, in several processes, on several machines, across restarts."""

import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from megatron_tikmix.errors import InputError
from megatron_tikmix.prepare import worker
from megatron_tikmix.prepare.parts import Encoding, PartWriter, finished, source_digest
from megatron_tikmix.prepare.readers import Part, parts_of
from megatron_tikmix.prepare.sources import Source

PART_BYTES = 64 << 20
SMALL_BYTES = 16 << 20  # less than this per process is not worth another process
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """A source, and the folder in which its parts are made.

    Attributes:
        source_digest: digest of the source's files and the encoding; part of the folder's name.
    """

    source: Source
    parts: tuple[Part, ...]
    folder: Path
    source_digest: str

    def prefix(self, number: int) -> Path:
        """Return the prefix of the files of part number `number`."""
        return self.folder / f"{number:06d}"

    @property
    def merged(self) -> Path:
        """The prefix of the files that hold all parts."""
        return self.folder / "merged"

    def folders(self) -> list[Path]:
        """Return this split's folders: the job's own, and those of earlier texts or options."""
        # The rest of the name must match exactly: another split's prefix may begin with this one.
        pattern = rf"{re.escape(self.source.prefix)}-[0-9a-f]{{16}}-\d+"
        return [path for path in self.folder.parent.iterdir() if re.fullmatch(pattern, path.name)]

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are still to be made."""
        if finished(self.merged) is not None:
            return []
        return [n for n in range(len(self.parts)) if finished(self.prefix(n)) is None]


def plan(
    sources: Sequence[Source], encoding: Encoding, folder: Path, part_bytes: int = PART_BYTES
) -> list[Job]:
    """Divide the sources into parts, the same on every machine and for any number of workers."""
    jobs = []
    for source in sources:
        digest = source_digest(source.files, encoding)
        parts = tuple(part for path in source.files for part in parts_of(path, part_bytes))
        name = f"{source.prefix}-{digest[:16]}-{part_bytes}"
        jobs.append(Job(source, parts, folder / name, digest))
    return jobs


def encode(
    jobs: Sequence[Job],
    encoding: Encoding,
    *,
    workers: int,
    shard: tuple[int, int] = (0, 1),
    advance: Advance = lambda done: None,
) -> None:
    """Make the missing parts, or shard i of n equal shares of them.

    Raises:
        InputError: a document is bad; parts made until then are kept.
    """
    index, count = shard
    places = [(job, n) for job in jobs for n in range(len(job.parts))]
    missing = {(id(job), n) for job in jobs for n in job.missing()}
    todo = []
    for place, (job, n) in enumerate(places):
        if (id(job), n) not in missing:
            advance(job.parts[n].bytes)
        elif place % count == index:
            job.folder.mkdir(parents=True, exist_ok=True)
            todo.append((job.parts[n], job.prefix(n)))
    if not todo:
        return
    size = sum(part.bytes for part, _ in todo)
    processes = min(workers, len(todo), -(-size // SMALL_BYTES))
    threads = max(workers // processes, 1)
    if processes == 1:
        worker.limit_threads(threads)
        writer = PartWriter(encoding, threads)
        for part, prefix in todo:
            writer.write(part, prefix, advance)
    else:
        _in_processes(todo, encoding, processes, threads, advance)


def _in_processes(
    todo: Sequence[tuple[Part, Path]],
    encoding: Encoding,
    processes: int,
    threads: int,
    advance: Advance,
) -> None:
    # Not forked from this process, in which the tokenizer and the progress bar have threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{worker.__name__}_preloaded"])
    done = context.Value("q", 0)
    seen = 0

    def report() -> None:
        nonlocal seen
        now = done.value
        advance(now - seen)
        seen = now

    with ProcessPoolExecutor(
        processes, context, initializer=worker.begin, initargs=(encoding, threads, done)
    ) as pool:
        futures: list[Future[str | None]] = [pool.submit(worker.write, *each) for each in todo]
        try:
            for future in futures:  # in order: the first problem is the same on every start
                while not wait([future], timeout=0.2).done:
                    report()
                problem = future.result()
                if problem is not None:
                    raise InputError(problem)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process ended unexpectedly, perhaps for want of memory; start again with "
                "fewer --workers: what is finished stays"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            report()
