"""What a piece has found so far, in a file that is whole after every step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Skipped(Exception):
    """A piece that has nothing to do here; the message is the reason, in one sentence."""


class Notes:
    """The steps of one piece; a piece that is started again leaves out those it finds here.

    Attributes:
        content: `steps` (name to `figures` and `kept`), and `machine`, `skipped` or `error` where
            there is one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: Figures = {"steps": {}}
        if path.is_file():
            self.content |= json.loads(path.read_text(encoding="utf-8"))
        # Of an earlier start; this one has its own.
        for field in ("error", "skipped"):
            self.content.pop(field, None)

    def __contains__(self, step: str) -> bool:
        return step in self.content["steps"]

    def figures(self, step: str) -> Figures:
        """The figures of a step that was done."""
        found: Figures = self.content["steps"][step]["figures"]
        return found

    def add(self, step: str, figures: Mapping[str, Any], *, kept: bool | None = None) -> None:
        """Note the figures of a step.

        Args:
            kept: whether what is promised held; None where nothing is.
        """
        self.content["steps"][step] = {"figures": dict(figures), "kept": kept}
        print(f"{step}: {dict(figures)}", flush=True)
        self.save()

    def save(self) -> None:
        write_json(self._path, self.content)


def write_json(path: Path, content: Any) -> None:
    """Write the file, all of it or nothing."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write the file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
