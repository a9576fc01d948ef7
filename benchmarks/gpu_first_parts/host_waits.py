"""Where the host waits for the card, in a training step and in a probe, by module and line."""

import collections
import inspect
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_first_parts import runs, versions
from gpu_first_parts.notes import Notes

# isort: split
import numpy as np
import torch

from megatron_tikmix.training.loop import train_interval

SHOWN = 12


def measure(notes: Notes, device: str, work: Path) -> None:
    versions.note_machine(notes, device)
    shutil.rmtree(work / "runs" / "host-waits", ignore_errors=True)
    settings = runs.tiny(work, "host-waits", {"model.bf16": True, "train.log_interval": 100})
    with runs.built(settings) as (run, _):
        assert run.remixer is not None
        probe = run.remixer.probe
        train_interval(run, until=2)
        with probe.open(1) as opened:  # what is made once is made
            opened.add(np.full(len(probe.domains), 1))
        with counted() as found:
            train_interval(run, until=3)
        _note(notes, "one training step", found, {})
        with counted() as found, probe.open(2) as opened:
            opened.add(np.full(len(probe.domains), 4))
            passes = len(probe.tasks) + 4 * len(probe.domains)
        _note(notes, "one probe", found, {"passes": passes})


@contextmanager
def counted() -> Iterator["collections.Counter[str]"]:
    """Counts the waits inside it by place: the last line of ours or of megatron-core's."""
    found: collections.Counter[str] = collections.Counter()

    def show(message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frame = inspect.currentframe()
        while frame is not None:  # from the innermost
            module = frame.f_globals.get("__name__", "")
            if module.startswith(("megatron_tikmix.", "megatron.")):
                found[f"{module}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back
        found["elsewhere"] += 1

    on_gpu = torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")


def _note(notes: Notes, step: str, found: "collections.Counter[str]", more: dict[str, int]) -> None:
    if not torch.cuda.is_available():
        notes.add(step, more | {"waits": None, "why": "there is no card to wait for"})
        return
    notes.add(step, more | {"waits": found.total(), "places": dict(found.most_common(SHOWN))})
