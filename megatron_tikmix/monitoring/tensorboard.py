"""A run in TensorBoard: Megatron's usual scalars, and what the mixture adds to them.

The horizontal axis is the iteration throughout: Megatron's "... vs samples" twins are left out,
for a resumed run hides old points by their step, and would take samples for iterations.
Tags are stable:

    lm loss, learning-rate, grad-norm     as Megatron-LM writes them
    tokens-per-second
    domain_loss/<domain>                  training loss, since the last logged step
    mixture/weight/<domain>               target, at boundaries
    mixture/realised/<domain>             share really drawn
    mixture/total_variation, mixture/effective_domains
    influence/<task>/<domain>, influence_se/<task>/<domain>     benefit sign: positive helps
    validation/loss/<task>
    validation/bits_per_byte/<task>       tasks of prompts and completions only
    mixture/decision                      text: what was decided at a boundary, and why
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_tikmix.monitoring.decision import decision_in_words

MEGATRON_TAGS = {"lm_loss": "lm loss", "learning_rate": "learning-rate", "grad_norm": "grad-norm"}


class TensorBoardWriter:
    """Writes the rows of `metrics.jsonl` and of the ledger as they come. One rank has one.

    A run resumed after `iteration` passes `purge_step=iteration + 1`: what the killed run wrote
    beyond its checkpoint is then hidden.
    """

    def __init__(self, log_dir: str | Path, purge_step: int | None = None) -> None:
        # Imported here: it costs a second, and only one rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=30)
        self._evaluated: int | None = None

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, metrics_row: Mapping[str, Any], realised: Mapping[str, float]) -> None:
        """A logged step; `realised` is each domain's share of the samples drawn."""
        iteration = metrics_row["iteration"]
        for field, tag in MEGATRON_TAGS.items():
            self._scalar(tag, metrics_row.get(field), iteration)
        self._scalar("tokens-per-second", metrics_row.get("tokens_per_second"), iteration)
        self._scalars("domain_loss", metrics_row.get("domain_loss"), iteration)
        self._scalars("mixture/realised", realised, iteration)
        self._validation(metrics_row, iteration)
        self._scalars("validation/bits_per_byte", metrics_row.get("task_bits_per_byte"), iteration)

    def stage(
        self, ledger_row: Mapping[str, Any], former_row: Mapping[str, Any] | None = None
    ) -> None:
        """A stage of the mixture; the row of the stage before lets the words name what moved."""
        iteration = ledger_row["start_iteration"]
        self._scalars("mixture/weight", ledger_row["weights"], iteration)
        self._scalars("mixture/epochs", ledger_row.get("domain_epochs"), iteration)
        for field in ("influence", "influence_se"):
            for task, values in (ledger_row.get(field) or {}).items():
                self._scalars(f"{field}/{task}", values, iteration)
        for field in ("total_variation", "total_variation_noise", "effective_domains"):
            self._scalar(f"mixture/{field}", ledger_row.get(field), iteration)
        for field, values in (ledger_row.get("rank_stability") or {}).items():
            self._scalars(f"rank_stability/{field}", values, iteration)
        certificate = (ledger_row.get("solution") or {}).get("certificate") or {}
        self._scalar("solver/duality_gap", certificate.get("gap"), iteration)
        audit = ledger_row.get("audit") or {}
        for field in ("difference", "low", "high"):
            self._scalar(f"audit/{field}", audit.get("overall", {}).get(field), iteration)
        self._validation(ledger_row, iteration)
        words = decision_in_words(former_row, ledger_row)
        self._writer.add_text("mixture/decision", words, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush what is pending and close the event file."""
        self._writer.close()

    def _validation(self, row: Mapping[str, Any], iteration: int) -> None:
        # A boundary's evaluation is in a metrics row and in the ledger: one point is enough.
        if row.get("task_loss") and iteration != self._evaluated:
            self._scalars("validation/loss", row["task_loss"], iteration)
            self._evaluated = iteration

    def _scalars(
        self, prefix: str, values: Mapping[str, float | None] | None, iteration: int
    ) -> None:
        for name, value in (values or {}).items():
            self._scalar(f"{prefix}/{name}", value, iteration)

    def _scalar(self, tag: str, value: float | None, step: int) -> None:
        if value is not None:
            self._writer.add_scalar(tag, value, step)
