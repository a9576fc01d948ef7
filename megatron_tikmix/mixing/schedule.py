"""MixtureSchedule: which sample of which domain every global sample index stands for."""

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing.blending import Counts, StageBlend
from megatron_tikmix.mixing.mixture import Mixture


@dataclass(frozen=True, eq=False)
class Stage:
    """A stretch of the run with one mixture."""

    index: int

    start_sample: int
    """Global index of its first sample."""

    integer_weights_D: Counts
    """int64 (D,), sum 2³⁰, in the schedule's order of domains; read-only."""

    start_counts_D: Counts
    """The domains' cursors: samples of each consumed before this stage, int64 (D,), read-only."""

    def __post_init__(self) -> None:
        self.integer_weights_D.flags.writeable = False
        self.start_counts_D.flags.writeable = False


class SampleLocation(NamedTuple):
    """What a global sample index stands for."""

    stage: int
    """Index of the stage."""

    domain: int
    """Index of the domain, in the schedule's order."""

    k: int
    """The domain's own sample number, counted over the whole run."""


class MixtureSchedule:
    """Stages of mixtures, only ever appended.

    The sample order is a pure function of (domains, block size, seed, stages, index): every rank
    and every later run finds the same sample at the same index. A domain goes on in each stage
    where the one before left it, so none of its samples is lost or repeated; appending a stage
    changes nothing before its first sample.

    Args:
        domains: names; their order is that of domain indices and of all (D,) arrays.
        block_size: samples of a block of the blending; stages are whole numbers of blocks.
        seed: of the order within blocks, 0 to 2⁶⁴ − 1.

    Raises:
        InputError: domains that are none or repeat.
    """

    def __init__(self, domains: Sequence[str], block_size: int, seed: int) -> None:
        if not domains or len(set(domains)) < len(domains):
            raise InputError(f"schedule: domains must be names, each once; got {list(domains)}")
        self.domains = tuple(domains)
        self.block_size = block_size
        self.seed = seed
        self._stages: list[Stage] = []
        self._starts: list[int] = []
        self._blends: list[StageBlend] = []

    @property
    def stages(self) -> Sequence[Stage]:
        """All stages so far."""
        return tuple(self._stages)

    def append(self, start_sample: int, mixture: Mixture | Mapping[str, int]) -> Stage:
        """Use a mixture (or integer weights by name, sum 2³⁰) from `start_sample` on.

        Raises:
            InputError: the first stage does not start at 0, a later one not a whole number of
                blocks after the one before, or the mixture names other domains.
        """
        self._check_start(start_sample)
        if not isinstance(mixture, Mixture):
            mixture = Mixture.from_integer_weights(mixture)
        mixture.array(self.domains)  # refuses other domains
        integers = mixture.integer_weights()
        weights_D = np.array([integers[name] for name in self.domains], dtype=np.int64)
        index = len(self._stages)
        blend = StageBlend(weights_D, self.block_size, self.seed, index)
        stage = Stage(index, start_sample, weights_D, self.domain_counts(start_sample))
        self._stages.append(stage)
        self._starts.append(start_sample)
        self._blends.append(blend)
        return stage

    def _check_start(self, start_sample: int) -> None:
        if not self._starts:
            if start_sample != 0:
                raise InputError(
                    f"schedule: the first stage must start at sample 0, not {start_sample}"
                )
            return
        samples = start_sample - self._starts[-1]
        if samples <= 0 or samples % self.block_size:
            raise InputError(
                f"schedule: stage {len(self._starts)} starts at sample {start_sample}; it must "
                f"start a whole number of blocks of {self.block_size} samples after "
                f"{self._starts[-1]}"
            )

    def locate(self, index: int) -> SampleLocation:
        """The stage, the domain and the domain's sample number of a global sample index.

        Raises:
            IndexError: `index` is negative, or the schedule has no stage.
        """
        stage = self._stage_of(index)
        domain, k = self._blends[stage.index].locate(index - stage.start_sample)
        return SampleLocation(stage.index, domain, int(stage.start_counts_D[domain]) + k)

    def domain_counts(self, n_samples: int) -> Counts:
        """Samples of each domain among the first `n_samples` of the run, int64 (D,)."""
        if n_samples == 0:
            return np.zeros(len(self.domains), dtype=np.int64)
        stage = self._stage_of(n_samples - 1)
        blend = self._blends[stage.index]
        return stage.start_counts_D + blend.counts(n_samples - stage.start_sample)

    def _stage_of(self, index: int) -> Stage:
        if index < 0 or not self._stages:
            raise IndexError(f"sample {index} is in none of the {len(self._stages)} stages")
        return self._stages[bisect.bisect_right(self._starts, index) - 1]

    def mixture(self, stage: int = -1) -> Mixture:
        """The mixture of a stage, as rounded to integer weights; by default the last one's."""
        weights_D = self._stages[stage].integer_weights_D
        return Mixture.from_integer_weights(
            dict(zip(self.domains, weights_D.tolist(), strict=True))
        )

    def digest(self) -> str:
        """sha256, in hex, of all that the sample order depends on; equal on ranks that agree."""
        content = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The whole schedule as plain values; arrays in the order of `domains`."""
        return {
            "domains": list(self.domains),
            "block_size": self.block_size,
            "seed": self.seed,
            "stages": [
                {
                    "start_sample": stage.start_sample,
                    "integer_weights": stage.integer_weights_D.tolist(),
                    "start_counts": stage.start_counts_D.tolist(),
                }
                for stage in self._stages
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "MixtureSchedule":
        """Undo :meth:`to_json`, computing every stage's start counts again.

        Raises:
            InputError: the counts found differ from those stored: they were made by other
                weights, another seed or another blending, and samples would be lost or repeated.
        """
        schedule = cls(data["domains"], data["block_size"], data["seed"])
        for row in data["stages"]:
            weights = dict(zip(schedule.domains, row["integer_weights"], strict=True))
            stage = schedule.append(row["start_sample"], weights)
            if stage.start_counts_D.tolist() != row["start_counts"]:
                raise InputError(
                    f"schedule: the domain counts stored for stage {stage.index} are not those its "
                    "stages lead to; restore the file, or start the run afresh"
                )
        return schedule
