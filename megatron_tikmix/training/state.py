"""Where a run is: the only thing, besides the parameters, that a checkpoint must carry."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.mixture.schedule import MixtureSchedule

SMOOTHING = 0.1
"""Weight of a domain's newest loss in its usual one: the mean of about its last ten."""


@dataclass
class LossSpikes:
    """Counts them, from the logged losses. A mixture that moves to harder domains makes none.

    Attributes:
        count: logged losses that were spikes.
        usual: the loss that each domain has had of late, smoothed.
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
            domain_tokens: over how many tokens each is the mean.
            factor: from how many times the usual loss on it is a spike; None: it never is.

        Returns:
            How many times the usual loss of these samples it was, if that is a spike.
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
        ledger: a row a stage, as in mixture.jsonl. Every rank counts stages by it; what
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
    ledger: Ledger = field(default_factory=Ledger)
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
