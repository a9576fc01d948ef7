"""Recording a run in files, TensorBoard and the terminal, all by the main rank.

A full disk does not end a run: rows that do not fit are written later, TensorBoard's events are
left out, and both are logged.
"""

import importlib.metadata
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

import megatron_tikmix
from megatron_tikmix.config import RunConfig
from megatron_tikmix.decision.ledger import LEDGER, Ledger, filed
from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import append_jsonl, json_line, read_jsonl
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.monitoring.files import RunFiles
from megatron_tikmix.monitoring.history import RunHistory
from megatron_tikmix.monitoring.report import write_report
from megatron_tikmix.monitoring.tensorboard import TensorBoardWriter
from megatron_tikmix.monitoring.terminal import Terminal
from megatron_tikmix.training.checkpoint_files import write_whole
from megatron_tikmix.training.state import TrainState

Row = dict[str, Any]

_log = logging.getLogger(__name__)


class RowFile:
    """A JSON lines file; rows that do not fit on a full disk are written later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: list[Row] = []
        self._late = 0  # rows that were delayed since the file was last complete

    def append(self, row: Row) -> bool:
        """Write the waiting rows and this one; return False if the disk is still full."""
        self._waiting.append(row)
        written = self.write_waiting()
        if not written:
            self._late += 1
        return written

    def write_waiting(self) -> bool:
        """Write the waiting rows; return False, and log it the first time, if the disk is full."""
        try:
            while self._waiting:
                append_jsonl(self._path, self._waiting[0])
                del self._waiting[0]
        except OSError as error:
            if not self._late:
                _log.error(
                    "A ROW OF %s WAS NOT WRITTEN: %s; training goes on, rows are kept in memory "
                    "and written when there is room",
                    self._path,
                    error.strerror,
                )
            return False
        if self._late:
            _log.warning("%s is whole again: %d rows were written late", self._path, self._late)
        self._late = 0
        return True

    def close(self) -> None:
        """Try a last time to write the waiting rows."""
        if self._waiting and not self.write_waiting():
            _log.error("%d rows of %s are lost", len(self._waiting), self._path)
            self._waiting.clear()


class Recorder:
    """Records a run. Every rank makes the same calls; only the main rank's have an effect."""

    def __init__(self, config: RunConfig, resolved: str, parallel: Parallel) -> None:
        self._config = config
        self._resolved = resolved
        self._parallel = parallel
        self._main = parallel.is_main
        self._folder = Path(config.run_dir)
        # On the main rank, both are set from `begin` to the end.
        self._terminal: Terminal | None = None
        self._tensorboard: TensorBoardWriter | None = None
        self._metrics = RowFile(self._folder / "metrics.jsonl")
        self._ledger = RowFile(self._folder / LEDGER)
        self._weights: Mapping[str, float] | None = None  # in force

    def open_folder(self) -> None:
        """Make the run's folder.

        Raises:
            InputError: it cannot be made or written to, or the baseline is not a directory.
        """
        if not self._main:
            return
        baseline = self._config.baseline
        if baseline is not None and not Path(baseline).is_dir():
            raise InputError(f"baseline {baseline} is not a directory; give the run_dir of a run")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise InputError(f"run_dir {self._folder} cannot be written to: {error}") from error

    def begin(self, plan: str, state: TrainState) -> None:
        """Open the files, cut back to where the run (re)starts, and print the plan.

        Raises:
            InputError: a file that an earlier start wrote is damaged, or one cannot be written.
        """
        if not self._main:
            return
        try:
            write_whole(self._folder / "config.yaml", self._resolved)
            dropped = self._reconcile(state)
            start = start_row(self._config, self._parallel, state.iteration)
            append_jsonl(self._folder / "starts.jsonl", start)
            self._weights = state.ledger[-1].weights if state.ledger else None
            # Hide the events that an earlier start wrote beyond this iteration.
            self._tensorboard = self._events(state.iteration + 1 if state.iteration else 0)
            self._tensorboard.hparams(yaml.safe_load(self._resolved))
        except OSError as error:
            raise InputError(f"run_dir {self._folder} cannot be written to: {error}") from error
        self._terminal = Terminal(self._config.train.train_iters, start_iteration=state.iteration)
        if state.iteration:
            plan += f"\nresumed      at iteration {state.iteration} from the newest checkpoint" + (
                f"; {dropped} rows written after it are dropped" if dropped else ""
            )
        self._terminal.say(plan)

    def step(self, row: Row, realised: Mapping[str, float]) -> None:
        """Record a row of metrics.jsonl.

        Args:
            realised: each domain's share of the samples drawn in the stage so far.
        """
        if self._terminal:
            written = self._metrics.append(row)
            self._to_tensorboard(lambda events: events.step(row, realised), written)
            self._terminal.step(row)

    def evaluation(self, iteration: int, task_loss: Mapping[str, float]) -> None:
        """Show the tasks' losses on reporting items."""
        if self._terminal:
            self._terminal.evaluation(iteration, task_loss)

    def probe_estimate(self, tokens: int, tokens_per_second: float) -> None:
        """Print how long the first probe will take at training's speed."""
        if self._terminal and tokens_per_second > 0:
            self._terminal.say(
                f"the probe's {tokens:,} tokens will take about {tokens / tokens_per_second:.1f} s "
                f"at training's {tokens_per_second:,.0f} tokens/s"
            )

    def probing(self, done: int, total: int) -> None:
        """Show the progress of a probe."""
        if self._terminal:
            self._terminal.status(f"probe: {done}/{total} passes" if done < total else "solving")

    def rolling_out(self, done: int, total: int) -> None:
        """Show the progress of rollouts."""
        if self._terminal:
            self._terminal.status(f"rollouts: {done}/{total}")

    def stage(self, ledger: Ledger) -> None:
        """Record the ledger's last row, which has just been added.

        The measurements go to a bank file first, to which the row and all later checkpoints refer.
        If the disk has no room for the file they stay in the row.
        """
        if not self._terminal:
            return
        try:
            ledger.replace_last(filed(ledger[-1], self._folder))
        except OSError as error:
            _log.error(
                "THE BANK OF STAGE %d WAS NOT WRITTEN: %s; training goes on, and what was measured "
                "is kept in the row of %s",
                ledger[-1].stage,
                error.strerror,
                LEDGER,
            )
        row, former = ledger[-1], ledger[-2] if len(ledger) > 1 else None
        written = self._ledger.append(row.to_json())
        self._to_tensorboard(lambda events: events.stage(row, former), written)
        self._weights = row.weights
        if former is not None:
            length = self._config.data.sequence_length
            tokens = {name: count * length for name, count in row.domain_samples.items()}
            self._terminal.boundary(former, row, tokens)

    def finish(self, stop_reason: str | None, iteration: int) -> None:
        """Write the report, and print where the files are and what the probes cost.

        Args:
            stop_reason: why the run ended early, at `iteration`; None if it did not.
        """
        if not self._terminal:
            return
        self.close()
        if stop_reason is not None:
            self._terminal.say(
                f"ended by {stop_reason} at iteration {iteration}, which is saved; "
                f"start again with the same run_dir to go on",
                whole_line=True,
            )
            return
        try:
            write_report(self._folder)
        except OSError as error:
            _log.error(
                "THE REPORT WAS NOT WRITTEN: %s; make room, and run tikmix report %s",
                error,
                self._folder,
            )
        history = RunHistory(RunFiles(self._folder))
        self._terminal.finish(
            self._folder,
            probe_token_share=history.probe_token_share,
            probe_time_share=history.probe_time_share,
        )

    def close(self) -> None:
        """Close the files and the progress bar; to be called after an error too."""
        if self._terminal is None:
            return
        self._metrics.close()
        self._ledger.close()
        if self._tensorboard is not None:
            self._to_tensorboard(TensorBoardWriter.close, disk_has_room=True)
        self._terminal.close()

    def _events(self, purge_step: int | None = None) -> TensorBoardWriter:
        return TensorBoardWriter(
            self._folder / "tensorboard",
            purge_step=purge_step,
            sequence_length=self._config.data.sequence_length,
            in_force=self._weights,
        )

    def _to_tensorboard(
        self, write: Callable[[TensorBoardWriter], None], disk_has_room: bool
    ) -> None:
        """Write events; leave out those that do not fit on a full disk."""
        try:
            if self._tensorboard is None and disk_has_room:
                self._tensorboard = self._events()
            if self._tensorboard is not None:
                write(self._tensorboard)
        except OSError as error:
            # A writer that failed is unusable; the next events go to a new writer and file.
            self._tensorboard = None
            _log.error(
                "TENSORBOARD'S EVENTS ARE NOT WRITTEN: %s; training goes on, and so do they when "
                "there is room; the rows are in metrics.jsonl and mixture.jsonl",
                error,
            )

    def _reconcile(self, state: TrainState) -> int:
        """Drop the rows beyond the checkpoint from the files; return their number."""
        metrics, ledger = self._folder / "metrics.jsonl", self._folder / LEDGER
        rows, stages = read_jsonl(metrics), read_jsonl(ledger)
        kept = [row for row in rows if row["iteration"] <= state.iteration]
        beyond = len(rows) - len(kept) + max(0, len(stages) - len(state.ledger))
        for path, content in ((metrics, kept), (ledger, state.ledger.to_json())):
            text = "".join(json_line(row) for row in content)
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_whole(path, text)
        return beyond


PACKAGES = ("megatron-core", "torch", "numpy", "scipy", "clarabel", "lightgbm", "tokenizers")
"""Packages on which results may depend."""


def start_row(config: RunConfig, parallel: Parallel, iteration: int) -> dict[str, Any]:
    """Return a row of `starts.jsonl`: time, first iteration, layout, device and versions."""
    device = parallel.device
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "iteration": iteration,
        "world_size": parallel.world_size,
        "layout": {
            "tensor": config.model.tensor_model_parallel_size,
            "pipeline": config.model.pipeline_model_parallel_size,
            "data": parallel.data_parallel_size,
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": {
            "python": platform.python_version(),
            "megatron_tikmix": megatron_tikmix.__version__,
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
