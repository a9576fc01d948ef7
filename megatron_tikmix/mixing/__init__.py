"""Mixtures of training domains: deciding them, and drawing samples by them. No torch."""

from megatron_tikmix.mixing.batch_sizes import BatchSizes
from megatron_tikmix.mixing.blending import StageBlend
from megatron_tikmix.mixing.candidates import propose_candidates
from megatron_tikmix.mixing.certificate import Certificate
from megatron_tikmix.mixing.constraints import DomainGroup, MixtureConstraints, epoch_caps
from megatron_tikmix.mixing.influence_matrix import InfluenceMatrix
from megatron_tikmix.mixing.mixture import WEIGHT_TOTAL, Mixture
from megatron_tikmix.mixing.objective import Objective
from megatron_tikmix.mixing.policies import propose_mixture
from megatron_tikmix.mixing.schedule import (
    MixtureSchedule,
    SampleLocation,
    SampleLocations,
    Stage,
)
from megatron_tikmix.mixing.schedule_file import ScheduleFile
from megatron_tikmix.mixing.solution import MixtureSolution
from megatron_tikmix.mixing.surrogate import MixtureSurrogate, SurrogateSkill
from megatron_tikmix.mixing.tikmix_d import solve_tikmix_d
from megatron_tikmix.mixing.tikmix_m import solve_tikmix_m

__all__ = [
    "WEIGHT_TOTAL",
    "BatchSizes",
    "Certificate",
    "DomainGroup",
    "InfluenceMatrix",
    "Mixture",
    "MixtureConstraints",
    "MixtureSchedule",
    "MixtureSolution",
    "MixtureSurrogate",
    "Objective",
    "SampleLocation",
    "SampleLocations",
    "ScheduleFile",
    "Stage",
    "StageBlend",
    "SurrogateSkill",
    "epoch_caps",
    "propose_candidates",
    "propose_mixture",
    "solve_tikmix_d",
    "solve_tikmix_m",
]
