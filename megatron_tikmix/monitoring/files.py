"""The files of a run directory: training appends to them, everything else reads them.

    config.yaml     the resolved configuration
    metrics.jsonl   one object for each logged step
    mixture.jsonl   the ledger: one object for each stage of the mixture
    starts.jsonl    one object for each start of the run, with versions and layout

Whole lines are appended and flushed, so the files can be read while a run goes on, and a killed run
loses at most the line that it was writing.
"""

from functools import cached_property
from pathlib import Path

import yaml

from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import Row, read_jsonl


class RunFiles:
    """The contents of a run directory. Each file is read once, when it is first asked for."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        if not self.run_dir.is_dir():
            raise InputError(f"{self.run_dir} is not a directory; give a run's output directory.")

    @cached_property
    def config(self) -> Row:
        """The resolved configuration; empty until it is written."""
        path = self.run_dir / "config.yaml"
        if not path.exists():
            return {}
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not readable YAML: {error}") from error
        return config if isinstance(config, dict) else {}

    @cached_property
    def metrics(self) -> list[Row]:
        """The row of each logged step, by iteration."""
        return _last_of_each(read_jsonl(self.run_dir / "metrics.jsonl"), "iteration")

    @cached_property
    def ledger(self) -> Ledger:
        """The rows of the stages."""
        return Ledger.read(self.run_dir)

    @cached_property
    def starts(self) -> list[Row]:
        """The row of each start of training, in order of time; resuming is a start too."""
        return read_jsonl(self.run_dir / "starts.jsonl")


def _last_of_each(rows: list[Row], key: str) -> list[Row]:
    """Return the last row of each `key`: a resumed run repeats the rows after its checkpoint."""
    latest = {row[key]: row for row in rows if key in row}
    return [latest[value] for value in sorted(latest)]
