"""Repetition: how often a schedule passes over each domain, and whether it runs out."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL
from megatron_tikmix.mixture.schedule import MixtureSchedule


@dataclass(frozen=True)
class Shortage:
    """A domain that reaches its allowed number of passes too early.

    Attributes:
        sample: global index of the sample at which it does.
        epochs: passes over the domain that the whole stretch would take.
        largest_weight: the largest constant weight with which it would last.
    """

    domain: str
    sample: int
    epochs: float
    most_epochs: float
    largest_weight: float


def planned_samples(schedule: MixtureSchedule, samples: int) -> NDArray[np.float64]:
    """Return each domain's samples among the first `samples`, ± 1 for each stage; float64 (D,)."""
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
    """Return the domain that runs out first within the first `samples` of a schedule, or None.

    Args:
        max_epochs: the allowed passes over a domain: for all, or by name.
    """
    if not isinstance(max_epochs, Mapping):
        max_epochs = dict.fromkeys(schedule.domains, max_epochs)
    planned_D = planned_samples(schedule, samples)
    found = []
    for index, name in enumerate(schedule.domains):
        if name not in max_epochs:
            continue
        allowed = max_epochs[name] * samples_per_epoch[name]
        # In each stage a domain may get one sample more than its weight says, by rounding.
        if planned_D[index] <= allowed + len(schedule.stages):
            continue
        found.append(
            Shortage(
                name,
                _when(schedule, samples, index, allowed),
                planned_D[index] / samples_per_epoch[name],
                max_epochs[name],
                allowed / samples,
            )
        )
    return min(found, key=lambda shortage: shortage.sample, default=None)


def _when(schedule: MixtureSchedule, samples: int, domain: int, allowed: float) -> int:
    left = allowed
    for start, end, weights_D in _stretches(schedule, samples):
        taken = (end - start) * weights_D[domain]
        if taken > left:
            return start + int(left / weights_D[domain])
        left -= taken
    return samples


def _stretches(
    schedule: MixtureSchedule, samples: int
) -> list[tuple[int, int, NDArray[np.float64]]]:
    """Return first sample, end and weights (D,) of each stage within the first `samples`."""
    ends = [stage.start_sample for stage in schedule.stages[1:]] + [samples]
    return [
        (stage.start_sample, min(end, samples), stage.integer_weights_D / WEIGHT_TOTAL)
        for stage, end in zip(schedule.stages, ends, strict=True)
        if stage.start_sample < samples
    ]
