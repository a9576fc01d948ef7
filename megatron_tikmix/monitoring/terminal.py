"""The output of a run while it trains: by rank 0, on standard error.

A terminal shows a progress bar with tables above it. A log file gets one line for each logged step,
as from Megatron-LM, and tables of at most 100 columns.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.monitoring.tables import boundary_table
from megatron_tikmix.monitoring.words import (
    clean,
    count,
    decision_in_words,
    duration,
    mean_loss,
    number,
    percent,
)

LOG_COLUMNS = 100
MOST_TASKS = 6
"""The most tasks that are listed one by one; with more, only the mean is shown."""


class Terminal:
    """Prints the progress of a run; a `quiet` one, for all ranks but one, prints nothing."""

    def __init__(
        self,
        total_iterations: int,
        *,
        start_iteration: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start = total_iterations, start_iteration
        self._clock, self._began = clock, clock()
        self._console = console or _standard_error(quiet)
        self._phase = ""
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.quiet:
            self._bar = Progress(
                TextColumn("iteration {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[figures]}", markup=False),
                TextColumn("{task.description}", markup=False),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task(
                "", total=total_iterations, completed=start_iteration, figures=""
            )
            self._bar.start()

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()

    def step(self, row: Mapping[str, Any]) -> None:
        """Show a logged step: a row of `metrics.jsonl`."""
        iteration, left = row["iteration"], duration(self._seconds_left(row["iteration"]))
        loss, speed = number(row.get("lm_loss"), 4), row.get("tokens_per_second")
        if self._bar is not None:
            figures = f"loss {loss} · {count(speed)} tokens/s · {left} left"
            self._bar.update(self._task, completed=iteration, figures=figures, description="")
            return
        self.say(
            f" iteration {iteration}/{self._total} | consumed samples {row['consumed_samples']}"
            f" | lm loss {loss} | learning rate {row['learning_rate']:.1e}"
            f" | grad norm {number(row.get('grad_norm'), 2)} | tokens/s {number(speed, 0)}"
            f" | time left {left}",
            whole_line=True,
        )

    def status(self, text: str) -> None:
        """Show progress between steps, "probe: 3/48 passes"; a log file gets each phase once."""
        phase = text.partition(":")[0]
        if self._bar is not None:
            self._bar.update(self._task, description=clean(text))
        elif phase and phase != self._phase:
            self.say(f" {text}")
        self._phase = phase

    def boundary(
        self,
        former_row: StageRow | None,
        row: StageRow,
        domain_tokens: Mapping[str, float],
    ) -> None:
        """Show a new stage from its row of the ledger: what moved, on what evidence, and why."""
        self.say("")
        for part in boundary_table(former_row, row, domain_tokens, self._console.width, MOST_TASKS):
            self._console.print(part)
        self.say(decision_in_words(None, row))  # the moves are in the table
        repeated = _repeated(row.domain_epochs)
        if repeated:
            self.say(repeated)
        self.say("")

    def evaluation(self, iteration: int, task_loss: Mapping[str, float | None]) -> None:
        """Show losses on held-out items."""
        few = len(task_loss) <= MOST_TASKS
        mean = "mean" if few else f"mean over {len(task_loss)} tasks"
        parts = [
            f" task loss at iteration {iteration}",
            f"{mean} {number(mean_loss(task_loss), 4)}",
        ]
        if few:
            parts += [f"{clean(task)} {number(loss, 4)}" for task, loss in task_loss.items()]
        self.say(" | ".join(parts), whole_line=True)

    def finish(
        self,
        run_dir: str | Path,
        probe_token_share: float | None = None,
        probe_time_share: float | None = None,
    ) -> None:
        """Print where the run's files are, and what probes cost."""
        self.close()
        run_dir = Path(run_dir)
        lines = [f"Done: {self._total} iterations in {duration(self._clock() - self._began)}."]
        if probe_token_share is not None:
            time_share = f", {percent(probe_time_share)} of the time" if probe_time_share else ""
            share = percent(probe_token_share)
            lines.append(f"The probe took {share} of all tokens processed{time_share}.")
        lines += [
            f"  the report    {run_dir / 'report.html'}",
            f"  the mixture   {run_dir / 'mixture.jsonl'}",
            f"  the metrics   {run_dir / 'metrics.jsonl'}",
            f"  checkpoints   {run_dir / 'checkpoints'}",
            f"  curves        tensorboard --logdir {run_dir / 'tensorboard'}",
        ]
        for line in lines:
            self.say(line, whole_line=True)

    def say(self, text: str, whole_line: bool = False) -> None:
        """Print plain text; `whole_line` does not wrap lines, so that they can be searched."""
        self._console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=whole_line)

    def _seconds_left(self, iteration: int) -> float | None:
        done = iteration - self._start
        elapsed = self._clock() - self._began  # boundaries included: they will come again
        return elapsed / done * (self._total - iteration) if done > 0 else None


def _repeated(epochs: Mapping[str, float]) -> str:
    """Name the domains whose second pass has begun, the most repeated first; empty without any."""
    seen = sorted((name for name in epochs if epochs[name] > 1), key=lambda name: -epochs[name])
    if not seen:
        return ""
    shown = ", ".join(f"{clean(name)} {number(epochs[name], 2)}" for name in seen[:MOST_TASKS])
    more = f", and {len(seen) - MOST_TASKS} more" if len(seen) > MOST_TASKS else ""
    return f"Epochs so far, of domains in their second or later: {shown}{more}."


def _standard_error(quiet: bool) -> Console:
    width = None if sys.stderr.isatty() else LOG_COLUMNS
    return Console(stderr=True, width=width, quiet=quiet)
