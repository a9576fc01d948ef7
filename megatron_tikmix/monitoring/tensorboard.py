"""A run in TensorBoard: Megatron's usual scalars, and what the mixture adds to them.

The horizontal axis is the iteration throughout: Megatron's "... vs samples" twins are left out,
for a resumed run hides old points by their step, and would take samples for iterations.
Tags are stable; docs/monitoring.md lists them. Custom Scalars has the charts that belong together.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megatron_tikmix.monitoring.cost import share_of_compute, spent
from megatron_tikmix.monitoring.decision import Influence, decision_in_words, mean_loss
from megatron_tikmix.monitoring.tensorboard_layout import (
    METRICS,
    hparams_of,
    layout_summary,
    predicted_gain,
)

MEGATRON_TAGS = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "tokens_per_second": "tokens-per-second",
    "memory_bytes": "mem-max-allocated-bytes",
    "skipped_iterations": "skipped-iterations",
    "loss_spikes": "loss-spikes",
}
SOLVER_TAGS = {"objective": "objective", "solve_seconds": "seconds"}
CERTIFICATE_TAGS = {"gap": "duality_gap", "lower_bound": "lower_bound", "violation": "violation"}
AUDITED = ("predicted", "difference", "low", "high")


class TensorBoardWriter:
    """Writes the rows of `metrics.jsonl` and of the ledger as they come. One rank has one.

    A run resumed after `iteration` passes `purge_step=iteration + 1`: what the killed run wrote
    beyond its checkpoint is then hidden.

    Args:
        sequence_length: tokens a sample; None: tokens are left out.
        in_force: weights of the stage that a resumed run is in.
    """

    def __init__(
        self,
        log_dir: str | Path,
        purge_step: int | None = None,
        sequence_length: int | None = None,
        in_force: Mapping[str, float] | None = None,
    ) -> None:
        # Imported here: it costs a second, and only one rank needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=30)
        self._sequence_length = sequence_length
        # Iterations whose evaluation and consumption are written; where a run goes on, it has both.
        self._evaluated = self._counted = purge_step - 1 if purge_step else None
        self._weights = in_force
        self._pending: list[tuple[str, float]] = []
        self._arranged = False
        self._has = {"decides": True, "audits": True}

    def __enter__(self) -> "TensorBoardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def hparams(self, config: Mapping[str, Any]) -> None:
        """The settings of the run's resolved configuration, for the HParams tab; before stages."""
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(hparams_of(config), dict.fromkeys(METRICS, 0.0)):
            self._writer.file_writer.add_summary(summary)
        policy, audit = config.get("remix", {}).get("policy"), config.get("audit", {})
        self._has = {
            "decides": policy not in ("static", "schedule"),
            "audits": bool(audit.get("enabled")),
        }

    def step(self, metrics_row: Mapping[str, Any], realised: Mapping[str, float]) -> None:
        """A logged step; `realised` is each domain's share of the samples drawn."""
        iteration = metrics_row["iteration"]
        for field, tag in MEGATRON_TAGS.items():
            self._scalar(tag, metrics_row.get(field))
        self._scalars("domain_loss", metrics_row.get("domain_loss"))
        self._scalars("mixture/realised", realised)
        if "domain_epochs" in metrics_row:  # an interval has ended here
            self._consumption(metrics_row, iteration)
        else:  # so that the target is drawn as steps; where an interval ends, the stage has it
            self._scalars("mixture/weight", self._weights)
        self._validation(metrics_row, iteration)
        self._scalars("validation/bits_per_byte", metrics_row.get("task_bits_per_byte"))
        self._write(iteration)

    def stage(
        self, ledger_row: Mapping[str, Any], former_row: Mapping[str, Any] | None = None
    ) -> None:
        """A stage of the mixture; the row of the stage before lets the words name what moved."""
        iteration = ledger_row["start_iteration"]
        self._arrange(ledger_row)
        self._weights = ledger_row["weights"]
        self._scalars("mixture/weight", ledger_row["weights"])
        self._consumption(ledger_row, iteration)
        self._influence(ledger_row, iteration)
        self._cost(ledger_row, former_row)
        for field in ("total_variation", "total_variation_noise", "effective_domains"):
            self._scalar(f"mixture/{field}", ledger_row.get(field))
        for field, values in (ledger_row.get("rank_stability") or {}).items():
            self._scalars(f"rank_stability/{field}", values)
        self._scalars("predicted_gain", predicted_gain(dict(ledger_row)))
        self._solver(ledger_row.get("solution") or {})
        self._audit(ledger_row.get("audit") or {})
        self._validation(ledger_row, iteration)
        self._write(iteration)
        words = decision_in_words(former_row, ledger_row)
        self._writer.add_text("mixture/decision", words, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush what is pending and close the event file."""
        self._writer.close()

    def _arrange(self, ledger_row: Mapping[str, Any]) -> None:
        """Write the layout of the charts, once the names of what they show are known."""
        if not self._arranged:
            tasks = list(ledger_row.get("task_loss") or {})
            weights = ledger_row["weights"]
            domains = sorted(weights, key=lambda name: -weights[name])  # the largest share a chart
            self._writer.file_writer.add_summary(layout_summary(domains, tasks, **self._has))
            self._arranged = True

    def _influence(self, row: Mapping[str, Any], iteration: int) -> None:
        """Values with their errors, as numbers, as the edges of a band, and as a picture."""
        matrix = Influence.of(row)
        if matrix is None:
            return
        from megatron_tikmix.monitoring.heat_map_image import heat_map_image

        for field in ("influence", "influence_se"):
            for task, values in (row.get(field) or {}).items():
                self._scalars(f"{field}/{task}", values)
        for field, edge_VD in (
            ("influence_low", matrix.values_VD - matrix.errors_VD),
            ("influence_high", matrix.values_VD + matrix.errors_VD),
        ):
            for task, edge_D in zip(matrix.tasks, edge_VD, strict=True):
                named = dict(zip(matrix.domains, edge_D.tolist(), strict=True))
                known = {name: edge for name, edge in named.items() if math.isfinite(edge)}
                self._scalars(f"{field}/{task}", known)
        image, _ = heat_map_image(matrix)
        self._writer.add_image("influence/heat_map", image, iteration, dataformats="HWC")

    def _consumption(self, row: Mapping[str, Any], iteration: int) -> None:
        """What was drawn of each domain so far."""
        # As with evaluations: the end of an interval is in a metrics row and in the ledger.
        if iteration == self._counted:
            return
        self._counted = iteration
        self._scalars("mixture/epochs", row.get("domain_epochs"))
        if self._sequence_length is not None:
            samples = row.get("domain_samples") or {}
            tokens = {name: count * self._sequence_length for name, count in samples.items()}
            self._scalars("mixture/tokens", tokens)

    def _cost(self, row: Mapping[str, Any], former: Mapping[str, Any] | None) -> None:
        """Of the compute since the last boundary, the shares of the probe and of all deciding."""
        parts = spent(row)
        if not parts or former is None:
            return
        probe = [part for part in parts if part.kind == "probe"]
        if self._sequence_length is not None:
            trained = (row["start_sample"] - former["start_sample"]) * self._sequence_length
            self._scalar("probe/share_of_compute", share_of_compute(probe, trained))
            self._scalar("decision/share_of_compute", share_of_compute(parts, trained))
        for part in probe:
            self._scalar("probe/seconds", part.seconds)
        seconds = [part.seconds for part in parts if part.seconds is not None]
        self._scalar("decision/seconds", sum(seconds))

    def _solver(self, solution: Mapping[str, Any]) -> None:
        """The answer's value, and what certifies it."""
        for field, tag in SOLVER_TAGS.items():
            self._scalar(f"solver/{tag}", solution.get(field))
        for field, tag in CERTIFICATE_TAGS.items():
            certificate = solution.get("certificate") or {}
            self._scalar(f"solver/{tag}", certificate.get(field))

    def _audit(self, audit: Mapping[str, Any]) -> None:
        """What was predicted and realised, overall and of each task."""
        for field in AUDITED:
            self._scalar(f"audit/{field}", audit.get("overall", {}).get(field))
            for task, found in audit.get("tasks", {}).items():
                self._scalar(f"audit/{field}/{task}", found.get(field))

    def _validation(self, row: Mapping[str, Any], iteration: int) -> None:
        # A boundary's evaluation is in a metrics row and in the ledger: one point is enough.
        if row.get("task_loss") and iteration != self._evaluated:
            self._scalars("validation/loss", row["task_loss"])
            mean = mean_loss(row["task_loss"])
            self._scalar("validation/mean_loss", mean if np.isfinite(mean) else None)
            self._evaluated = iteration

    def _scalars(self, prefix: str, values: Mapping[str, float | None] | None) -> None:
        for name, value in (values or {}).items():
            self._scalar(f"{prefix}/{name}", value)

    def _scalar(self, tag: str, value: float | None) -> None:
        if value is not None:
            self._pending.append((tag, value))

    def _write(self, iteration: int) -> None:
        """All that is pending, in one event: one each is slow with hundreds of domains."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in self._pending]
        self._pending.clear()
        self._writer.file_writer.add_summary(Summary(value=values), iteration)
