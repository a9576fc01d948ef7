"""The decision that banks are judged by: TiKMiX-D's answer, as a boundary would find it."""

from dataclasses import dataclass, field

from influence_parts.trained import Settings, Trained, large_bank
from megatron_tikmix.config import RemixConfig
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import InfluenceMatrix
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.objective import Goal
from megatron_tikmix.solve.tikmix_d import solve_tikmix_d

SUB_BATCHES = 1600
SUB_BATCH_SAMPLES = 4
HELPINGS = 8
PER_HELPING = SUB_BATCHES // HELPINGS
SEED = 1


def reference_bank(settings: Settings, found: Trained) -> SubBatchBank:
    """The large bank of the parts that draw from one: 1,600 sub-batches of each domain, `adam`."""
    return large_bank(
        settings,
        found,
        sub_batches=SUB_BATCHES,
        sub_batch_samples=SUB_BATCH_SAMPLES,
        helpings=HELPINGS,
        seed=SEED,
        curvature="adam",
    )


@dataclass(frozen=True)
class Decision:
    """Solves as after an interval of the uniform mixture, with the linear gain and the entropy."""

    prior: Mixture
    remix: RemixConfig = field(default_factory=RemixConfig)

    def __call__(self, influence: InfluenceMatrix) -> Mixture:
        return solve_tikmix_d(
            influence,
            self.prior,
            Goal(alpha=self.remix.alpha, beta=self.remix.beta, gamma=self.remix.gamma),
            self.remix.constraints,
        ).mixture
