"""Where a run is: the only thing, besides the parameters, that a checkpoint must carry."""

from dataclasses import dataclass, field
from typing import Any

from megatron_tikmix.mixing import MixtureSchedule
from megatron_tikmix.training.spikes import LossSpikes


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        schedule: the mixture's stages so far; with the seed it fixes the order of samples.
        ledger: one record a stage, as in mixture.jsonl. Every rank counts stages by it; what
            only the main rank knows of a decision is missing on the others.
        skipped_iterations: steps that megatron-core's optimizer did not apply.
        added_domains: that the checkpoint did not know, and that have no weight yet.
    """

    train_iters: int
    schedule: MixtureSchedule
    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    spikes: LossSpikes = field(default_factory=LossSpikes)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    added_domains: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.iteration >= self.train_iters

    def withdraw_empty_stage(self) -> None:
        """Take back a stage that was opened and not trained on: another is to begin here."""
        if self.schedule.withdraw(self.consumed_samples):
            self.ledger.pop()

    def advance(self, samples: int, *, skipped: bool) -> None:
        """Count one iteration that consumed `samples`."""
        self.iteration += 1
        self.consumed_samples += samples
        self.skipped_iterations += skipped
