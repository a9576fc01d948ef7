"""A run as arrays: the contents of its files, combined for pictures, tables and answers.

Letters: K stages of the mixture, D domains.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_tikmix.decision.ledger import StageRow
from megatron_tikmix.monitoring.files import RunFiles
from megatron_tikmix.monitoring.words import Array, Influence, Spent, mean_loss, spent


class RunHistory:
    """The quantities derived from a run's files, at any time during the run.

    Domains are in the order of their last weight, the largest first.
    """

    def __init__(self, files: RunFiles) -> None:
        self.config = files.config
        self.metrics = files.metrics
        self.stages = files.ledger
        self.starts = files.starts
        last = self.stages[-1].weights if self.stages else {}
        names = dict.fromkeys(name for row in self.stages for name in row.weights)
        self.domains: list[str] = sorted(names, key=lambda name: -last.get(name, 0.0))
        self.weights_KD = self._per_domain([row.weights for row in self.stages])

    def setting(self, *path: str) -> Any:
        """Return a value of the configuration, or None."""
        value: Any = self.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _per_domain(self, values_K: Sequence[Mapping[str, float]]) -> Array:
        """Return each stage's values by domain as an array; 0 where there is none."""
        rows = [[values.get(name, 0.0) for name in self.domains] for values in values_K]
        return np.array(rows, dtype=np.float64).reshape(len(self.stages), len(self.domains))

    @property
    def iteration(self) -> int:
        """The last iteration in any file."""
        logged = self.metrics[-1]["iteration"] if self.metrics else 0
        return max(logged, self.stages[-1].start_iteration if self.stages else 0)

    @property
    def samples(self) -> int:
        """Samples trained on so far."""
        logged = self.metrics[-1].get("consumed_samples", 0) if self.metrics else 0
        return max(logged, self.stages[-1].start_sample if self.stages else 0)

    @property
    def sequence_length(self) -> int | None:
        """Tokens in a sample."""
        return self.setting("data", "sequence_length")

    @property
    def edges(self) -> list[int]:
        """The K + 1 iterations that bound the stages; the last one may still grow."""
        starts = [row.start_iteration for row in self.stages]
        return [*starts, self.iteration] if starts else []

    @cached_property
    def samples_KD(self) -> Array:
        """Samples drawn from each domain within each stage.

        The ledger counts them at every boundary, and the metrics since the last one.
        """
        if not self.stages:
            return np.zeros((0, 0))
        before_KD = self._per_domain([row.domain_samples for row in self.stages])
        counted = self.metrics[-1].get("domain_samples") if self.metrics else None
        if counted and self.metrics[-1]["iteration"] >= self.stages[-1].start_iteration:
            open_D = np.array([counted.get(name, 0.0) for name in self.domains]) - before_KD[-1]
        else:  # the blending follows the weights up to one sample
            open_D = self.weights_KD[-1] * (self.samples - self.stages[-1].start_sample)
        return np.vstack([np.diff(before_KD, axis=0), open_D])

    @cached_property
    def realised_KD(self) -> Array:
        """Each domain's share of the samples drawn within a stage; NaN where none is drawn yet."""
        total_K1 = self.samples_KD.sum(axis=1, keepdims=True)
        return self.samples_KD / np.where(total_K1 > 0, total_K1, np.nan)

    @cached_property
    def epochs_KD(self) -> Array:
        """Passes over each domain within each stage; NaN for a domain whose size is not known yet.

        The ledger has samples and epochs, and so have the metrics where an interval ends: their
        ratio is the domain's size.
        """
        counted: list[tuple[Any, Any]] = [
            (row.domain_samples, row.domain_epochs) for row in self.stages
        ]
        counted += [(row.get("domain_samples"), row.get("domain_epochs")) for row in self.metrics]
        known = [(samples, epochs) for samples, epochs in counted if samples and epochs]
        samples, epochs = known[-1] if known else ({}, {})
        samples_D = np.array([samples.get(name, 0.0) for name in self.domains], dtype=np.float64)
        epochs_D = np.array([epochs.get(name, 0.0) for name in self.domains], dtype=np.float64)
        epochs_per_sample_D = np.full(len(self.domains), np.nan)
        np.divide(epochs_D, samples_D, out=epochs_per_sample_D, where=samples_D > 0)
        return self.samples_KD * epochs_per_sample_D

    @property
    def epoch_caps_D(self) -> Array:
        """`remix.constraints.max_epochs` of each domain; infinite where there is none."""
        caps = self.setting("remix", "constraints", "max_epochs")
        named = caps if isinstance(caps, dict) else dict.fromkeys(self.domains, caps)
        found = [named.get(name) for name in self.domains]
        return np.array([np.inf if cap is None else cap for cap in found], dtype=np.float64)

    @cached_property
    def measured(self) -> list[tuple[StageRow, Influence]]:
        """The influence matrix of each stage at whose boundary one was measured."""
        found = [(row, Influence.of(row, self.domains)) for row in self.stages]
        return [(row, influence) for row, influence in found if influence is not None]

    @cached_property
    def task_losses(self) -> dict[int, dict[str, float | None]]:
        """Loss of each task at every iteration where an evaluation took place."""
        losses: dict[int, dict[str, float | None]]
        losses = {row.start_iteration: dict(row.task_loss) for row in self.stages}
        losses |= {row["iteration"]: row["task_loss"] for row in self.metrics if "task_loss" in row}
        return {iteration: losses[iteration] for iteration in sorted(losses) if losses[iteration]}

    @cached_property
    def mean_task_loss(self) -> dict[int, float]:
        """Mean over tasks of `task_losses`."""
        return {iteration: mean_loss(losses) for iteration, losses in self.task_losses.items()}

    @property
    def probe_token_share(self) -> float | None:
        """The probes' share of the tokens that training and probes processed."""
        if self.sequence_length is None:
            return None
        probe = sum(row.probe_tokens for row in self.stages)
        return share_of(probe, self.samples * self.sequence_length)

    @property
    def probe_time_share(self) -> float | None:
        """The probes' share of the seconds that training and probes took.

        The time of training follows from the logged throughput, without evaluation and checkpoints.
        """
        if self.sequence_length is None:
            return None
        probe = sum(row.probe_seconds for row in self.stages)
        return share_of(probe, self.training_seconds)

    @cached_property
    def training_seconds(self) -> float:
        """Seconds of training steps, from the logged throughput; 0 without a sequence length."""
        seconds, before = 0.0, 0
        for row in self.metrics:
            if row.get("tokens_per_second"):
                tokens = (row["consumed_samples"] - before) * (self.sequence_length or 0)
                seconds += tokens / row["tokens_per_second"]
            before = row["consumed_samples"]
        return seconds

    @cached_property
    def spent(self) -> list[Spent]:
        """The costs of all boundaries, summed by kind: probes, rollouts and audits."""
        parts = [part for row in self.stages for part in spent(row)]
        return [
            _total([part for part in parts if part.kind == kind])
            for kind in dict.fromkeys(part.kind for part in parts)
        ]


def share_of(part: float, rest: float) -> float | None:
    """Return `part` as a share of `part` + `rest`; None if both are 0."""
    return part / (part + rest) if part + rest > 0 else None


def _total(parts: list[Spent]) -> Spent:
    """Return the sum of costs of one kind."""
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return Spent(
        parts[0].kind,
        sum(part.trained_tokens for part in parts),
        sum(part.evaluated_tokens for part in parts),
        sum(seconds) if seconds else None,
    )
