"""How often each domain's tokens will have been seen, as far as the mixture is settled."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL
from megatron_tikmix.mixture.schedule import MixtureSchedule


@dataclass(frozen=True)
class Shortage:
    """A domain that gives all it may before a settled stretch of the run ends.

    Attributes:
        sample: global index of the sample at which that is so.
        epochs: passes over the domain that the stretch would take.
        largest_weight: with which it would last, if the stretch had this one weight.
    """

    domain: str
    sample: int
    epochs: float
    most_epochs: float
    largest_weight: float


def planned_samples(schedule: MixtureSchedule, samples: int) -> NDArray[np.float64]:
    """Samples of each domain among the first `samples`, to within one a stage; float64 (D,)."""
    total_D = np.zeros(len(schedule.domains))
    for start, end, weights_D in _stretches(schedule, samples):
        total_D += (end - start) * weights_D
    return total_D


def first_shortage(
    schedule: MixtureSchedule,
    samples: int,
    samples_per_epoch: Mapping[str, int],
    max_epochs: float | Mapping[str, float],
) -> Shortage | None:
    """The domain that runs dry first among the first `samples` of a schedule, if one does.

    Args:
        max_epochs: passes over a domain that are allowed: for all, or by name.
    """
    if not isinstance(max_epochs, Mapping):
        max_epochs = dict.fromkeys(schedule.domains, max_epochs)
    planned_D = planned_samples(schedule, samples)
    found = []
    for index, name in enumerate(schedule.domains):
        if name not in max_epochs:
            continue
        may = max_epochs[name] * samples_per_epoch[name]
        # A stage's counts are the weight's, rounded up or down.
        if planned_D[index] <= may + len(schedule.stages):
            continue
        found.append(
            Shortage(
                name,
                _when(schedule, samples, index, may),
                planned_D[index] / samples_per_epoch[name],
                max_epochs[name],
                may / samples,
            )
        )
    return min(found, key=lambda shortage: shortage.sample, default=None)


def _when(schedule: MixtureSchedule, samples: int, domain: int, may: float) -> int:
    left = may
    for start, end, weights_D in _stretches(schedule, samples):
        taken = (end - start) * weights_D[domain]
        if taken > left:
            return start + int(left / weights_D[domain])
        left -= taken
    return samples


def _stretches(
    schedule: MixtureSchedule, samples: int
) -> list[tuple[int, int, NDArray[np.float64]]]:
    """First sample, end and weights (D,) of each stage, as far as `samples`."""
    ends = [stage.start_sample for stage in schedule.stages[1:]] + [samples]
    return [
        (stage.start_sample, min(end, samples), stage.integer_weights_D / WEIGHT_TOTAL)
        for stage, end in zip(schedule.stages, ends, strict=True)
        if stage.start_sample < samples
    ]
