"""The progress of a run: all that a checkpoint must hold besides the model and the optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.mixture.schedule import MixtureSchedule

SMOOTHING = 0.1
"""Weight of a domain's newest loss in its usual loss, a mean of about the last ten."""


@dataclass
class LossSpikes:
    """A counter of loss spikes. A mixture that moves to harder domains causes none.

    Attributes:
        count: number of logged losses that were spikes.
        usual: each domain's recent loss, smoothed.
    """

    count: int = 0
    usual: dict[str, float] = field(default_factory=dict)

    def see(
        self,
        domain_loss: Mapping[str, float],
        domain_tokens: Mapping[str, float],
        factor: float | None,
    ) -> float | None:
        """Take in the mean losses of a logged row.

        Args:
            domain_tokens: the number of tokens that each mean is over.
            factor: a loss above `factor` times the usual one is a spike; None: none ever is.

        Returns:
            The ratio of the loss to the usual loss if it is a spike, else None.
        """
        known = [name for name in domain_loss if name in self.usual]
        loss = sum(domain_tokens[name] * domain_loss[name] for name in known)
        usual = sum(domain_tokens[name] * self.usual[name] for name in known)
        for name, value in domain_loss.items():
            before = self.usual.setdefault(name, value)
            self.usual[name] = before + SMOOTHING * (value - before)
        if factor is None or not usual or loss <= factor * usual:
            return None
        self.count += 1
        return loss / usual


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        schedule: the mixture's stages so far; with the seed it fixes the order of samples.
        ledger: one row for each stage, as in mixture.jsonl, on every rank; only the main rank's
            rows hold the details of decisions.
        skipped_iterations: steps that megatron-core's optimizer did not apply.
        added_domains: domains that are not in the checkpoint, and have no weight yet.
    """

    train_iters: int
    schedule: MixtureSchedule
    iteration: int = 0
    consumed_samples: int = 0
    skipped_iterations: int = 0
    spikes: LossSpikes = field(default_factory=LossSpikes)
    ledger: Ledger = field(default_factory=Ledger)
    added_domains: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.iteration >= self.train_iters

    def withdraw_empty_stage(self) -> None:
        """Remove the last stage if it has not been trained on, to make room for another."""
        if self.schedule.withdraw(self.consumed_samples):
            self.ledger.pop()

    def advance(self, samples: int, *, skipped: bool) -> None:
        """Count one iteration that consumed `samples`."""
        self.iteration += 1
        self.consumed_samples += samples
        self.skipped_iterations += skipped
