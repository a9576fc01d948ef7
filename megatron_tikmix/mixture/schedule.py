"""MixtureSchedule: maps every global sample index to a domain and a sample of it."""

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.blending import Counts, StageBlend
from megatron_tikmix.mixture.mixture import Mixture


@dataclass(frozen=True, eq=False)
class Stage:
    """A stretch of the run with one mixture."""

    index: int

    start_sample: int
    """Global index of its first sample."""

    integer_weights_D: Counts
    """int64 (D,), sum 2³⁰, in the schedule's order of domains; read-only."""

    start_counts_D: Counts
    """Samples of each domain consumed before this stage, int64 (D,), read-only."""

    def __post_init__(self) -> None:
        self.integer_weights_D.flags.writeable = False
        self.start_counts_D.flags.writeable = False


class SampleLocation(NamedTuple):
    """The sample that a global sample index stands for."""

    stage: int
    """Index of the stage."""

    domain: int
    """Index of the domain, in the schedule's order."""

    k: int
    """Number of the sample within its domain, counted over the whole run."""


class SampleLocations(NamedTuple):
    """The samples of N global sample indices; int64 (N,) each, as in :class:`SampleLocation`."""

    stages_N: NDArray[np.int64]
    domains_N: NDArray[np.int64]
    k_N: NDArray[np.int64]


class MixtureSchedule:
    """Stages of mixtures, which are only ever appended.

    The sample order is a pure function of (domains, block size, seed, stages, index): every rank
    and every later run finds the same sample at the same index. In each stage a domain continues
    where the previous one ended, so none of its samples is lost or repeated; appending a stage
    changes nothing before its first sample.

    Args:
        domains: names; their order is that of domain indices and of all (D,) arrays.
        block_size: samples of a block of the blending: one number, or the sizes of the global
            batches; stages are whole numbers of blocks.
        seed: fixes the order within blocks, 0 to 2⁶⁴ − 1.

    Raises:
        InputError: there is no domain, or a name repeats.
    """

    def __init__(self, domains: Sequence[str], block_size: int | BatchSizes, seed: int) -> None:
        if not domains or len(set(domains)) < len(domains):
            raise InputError(f"schedule: domains must be names, each once; got {list(domains)}")
        self.domains = tuple(domains)
        if not isinstance(block_size, BatchSizes):
            block_size = BatchSizes.constant(block_size)
        self.blocks = block_size
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
            InputError: the first stage does not start at 0, a later one does not start a whole
                number of blocks after the one before, or the mixture names other domains.
        """
        self._check_start(start_sample)
        if not isinstance(mixture, Mixture):
            mixture = Mixture.from_integer_weights(mixture)
        mixture.array(self.domains)  # refuses other domains
        integers = mixture.integer_weights()
        weights_D = np.array([integers[name] for name in self.domains], dtype=np.int64)
        return self._append(start_sample, weights_D, self.domain_counts(start_sample))

    def _append(self, start_sample: int, weights_D: Counts, start_counts_D: Counts) -> Stage:
        index = len(self._stages)
        blend = StageBlend(weights_D, self.blocks.after(start_sample), self.seed, index)
        stage = Stage(index, start_sample, weights_D, start_counts_D)
        self._stages.append(stage)
        self._starts.append(start_sample)
        self._blends.append(blend)
        return stage

    def withdraw(self, n_samples: int) -> bool:
        """Remove the last stage if none of the run's first `n_samples` belongs to it."""
        if not self._stages or self._starts[-1] < n_samples:
            return False
        for of_stages in (self._stages, self._starts, self._blends):
            of_stages.pop()
        return True

    def _check_start(self, start_sample: int) -> None:
        if not self._starts:
            if start_sample != 0:
                raise InputError(
                    f"schedule: the first stage must start at sample 0, not {start_sample}"
                )
            return
        if start_sample <= self._starts[-1] or not self.blocks.is_end(start_sample):
            raise InputError(
                f"schedule: stage {len(self._starts)} starts at sample {start_sample}; it must "
                f"start a whole number of blocks of {self.blocks.size} samples after "
                f"{self._starts[-1]}"
            )

    def locate(self, index: int) -> SampleLocation:
        """Return stage, domain and the domain's sample number of a global sample index.

        Raises:
            IndexError: `index` is negative, or the schedule has no stage.
        """
        stage = self._stage_of(index)
        domain, k = self._blends[stage.index].locate(index - stage.start_sample)
        return SampleLocation(stage.index, domain, int(stage.start_counts_D[domain]) + k)

    def locate_many(self, indices: ArrayLike) -> SampleLocations:
        """Do :meth:`locate` for many global sample indices, in any order; return int64 (N,) each.

        Consecutive indices are cheap: each block is computed once.

        Raises:
            IndexError: an index is negative, or the schedule has no stage.
        """
        index_N = np.asarray(indices, dtype=np.int64)
        if not len(index_N):
            return SampleLocations(index_N, index_N, index_N)
        low, high = int(index_N.min()), int(index_N.max())
        stage = self._stage_of(low)
        if self._stage_of(high) is stage:  # as a rule
            block = self._blends[stage.index].locate_many(index_N - stage.start_sample)
            return SampleLocations(
                np.full_like(index_N, stage.index),
                block.domains_N,
                stage.start_counts_D[block.domains_N] + block.k_N,
            )
        stages_N = np.searchsorted(self._starts, index_N, side="right") - 1
        found = SampleLocations(stages_N, np.empty_like(index_N), np.empty_like(index_N))
        for number in np.unique(stages_N).tolist():
            stage, of_stage = self._stages[number], stages_N == number
            block = self._blends[number].locate_many(index_N[of_stage] - stage.start_sample)
            found.domains_N[of_stage] = block.domains_N
            found.k_N[of_stage] = stage.start_counts_D[block.domains_N] + block.k_N
        return found

    def domain_counts(self, n_samples: int) -> Counts:
        """Return each domain's samples among the first `n_samples` of the run, int64 (D,)."""
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
        """Return the mixture of a stage, rounded to integer weights; default: the last stage."""
        weights_D = self._stages[stage].integer_weights_D
        return Mixture.from_integer_weights(
            dict(zip(self.domains, weights_D.tolist(), strict=True))
        )

    def digest(self) -> str:
        """Return the SHA-256, in hex, of everything that determines the sample order."""
        content = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the whole schedule as plain values; arrays in the order of `domains`."""
        ramp_up = {} if self.blocks.is_constant else {"block_sizes": self.blocks.to_json()}
        return {
            "domains": list(self.domains),
            "block_size": self.blocks.size,
            **ramp_up,
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
    def from_json(
        cls,
        data: Mapping[str, Any],
        consumed_samples: int = 0,
        domain_samples: Sequence[int] | None = None,
        domains: Sequence[str] | None = None,
    ) -> "MixtureSchedule":
        """Undo :meth:`to_json`, without computing any block.

        Args:
            domain_samples: :meth:`domain_counts` of `consumed_samples`, the end of a block in the
                last stage. If given, the schedule continues from there at no cost.
            domains: the stored domains, in their order, and new ones without samples so far.

        Raises:
            InputError: a stored domain is missing or in another place, or stored counts do not fit
                the stages' weights, so that samples would be lost or repeated.
        """
        sizes = data.get("block_sizes", data["block_size"])
        blocks = sizes if isinstance(sizes, int) else BatchSizes(sizes)
        stored = list(data["domains"])
        schedule = cls(stored if domains is None else domains, blocks, data["seed"])
        if [name for name in schedule.domains if name in stored] != stored:
            raise InputError(
                f"schedule: domains can be added to {', '.join(stored)}, but these must stay, and "
                f"in this order"
            )
        places = [schedule.domains.index(name) for name in stored]

        def widened(values: Sequence[int]) -> Counts:
            """Return an array over the stored domains as one over all domains."""
            wide_D = np.zeros(len(schedule.domains), dtype=np.int64)
            if len(values) == len(stored):
                wide_D[places] = values
            return wide_D

        for row in data["stages"]:
            start, counts_D = row["start_sample"], widened(row["start_counts"])
            schedule._check_start(start)
            whole = len(row["integer_weights"]) == len(row["start_counts"]) == len(stored)
            if not whole or not schedule._follows(start, counts_D):
                raise InputError(
                    f"schedule: the domain counts stored for stage {len(schedule._stages)} are not "
                    "those its stages lead to; restore the file, or start the run afresh"
                )
            schedule._append(start, widened(row["integer_weights"]), counts_D)
        if domain_samples is not None and schedule._stages:
            stage = schedule._stages[-1]
            counts_D = widened(domain_samples) - stage.start_counts_D
            schedule._blends[-1].resume(consumed_samples - stage.start_sample, counts_D)
        return schedule

    def _follows(self, start_sample: int, counts_D: Counts) -> bool:
        """Return whether these start counts can follow the stage before."""
        if not self._stages:
            return counts_D.shape == (len(self.domains),) and not counts_D.any()
        last = self._stages[-1]
        return counts_D.shape == last.start_counts_D.shape and self._blends[-1].check_counts(
            start_sample - last.start_sample, counts_D - last.start_counts_D
        )
