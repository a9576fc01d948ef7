"""Blending: integer weights -> interleaved domains, in blocks, without an index.

The samples of a stage are cut in blocks of N. After n samples, n at the end of a block, each
domain has had ⌊n·w_j⌋ or ⌈n·w_j⌉ of them. Which of the two: in every block each domain first gets
what brings it to the floor, and the places left go to the domains whose next sample must be out
soonest. This is earliest-deadline-first scheduling of unit jobs: the k-th sample of domain j may
go out in the first block with n·w_j > k − 1 and must be out after the first one with n·w_j ≥ k.
Spreading every domain evenly is a fractional schedule, so a whole one exists, and earliest
deadline first finds it: the floors never need more places than a block has. (Serving the largest
deficits first fails: it can leave more domains at their limit than a block has places.)

All arithmetic is exact, on int64.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing.mixture import WEIGHT_TOTAL

Counts = NDArray[np.int64]

_WEIGHT_BITS = WEIGHT_TOTAL.bit_length() - 1
_MOST_SAMPLES = 2**63 // WEIGHT_TOTAL - 1  # so that samples × weights fits an int64
_CHECKPOINTS = 32


class Block(NamedTuple):
    """One block of a stage, in the order its samples are drawn."""

    domains_N: NDArray[np.int64]
    """Domain index of each sample."""

    k_N: NDArray[np.int64]
    """How many earlier samples of this stage went to that domain."""


class StageBlend:
    """The order of the domains within a stage: a pure function of weights, block size, seed, stage.

    Random access: counts are kept for at most 32 blocks, evenly spread over those visited, and
    the rest is computed from the nearest one before; memory is O(D + N).

    Args:
        integer_weights: int (D,), zero or more, sum 2³⁰ (``Mixture.integer_weights``).
        block_size: samples of a block, N.
        seed: of the order within the blocks, 0 to 2⁶⁴ − 1.
        stage: index of the stage; every stage has an order of its own.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self, integer_weights: ArrayLike, block_size: int, seed: int, stage: int = 0
    ) -> None:
        self._weights_D = np.array(integer_weights, dtype=np.int64)
        if (self._weights_D < 0).any() or self._weights_D.sum() != WEIGHT_TOTAL:
            raise InputError(
                f"integer weights must be zero or more and sum to {WEIGHT_TOTAL}; "
                "take them from Mixture.integer_weights()"
            )
        if not 0 < block_size <= _MOST_SAMPLES:
            raise InputError(f"block_size is {block_size}; it must be a positive number of samples")
        if not 0 <= seed < 2**64:
            raise InputError(f"seed is {seed}; it must be from 0 to 2**64 - 1")
        self._block_size = block_size
        self._key = np.array([seed, stage], dtype=np.uint64)
        self._checkpoints = {0: np.zeros_like(self._weights_D)}  # blocks -> counts after them
        self._spacing = 1
        self._latest = (0, self._checkpoints[0])
        self._cached: tuple[int, Block] | None = None

    def locate(self, index: int) -> tuple[int, int]:
        """Sample `index` of the stage: its domain, and how many earlier ones went to that domain.

        Raises:
            IndexError: `index` is negative, or beyond the 2³³ − 1 samples a stage can hold.
        """
        number, place = divmod(index, self._block_size)
        block = self.block(number)
        return int(block.domains_N[place]), int(block.k_N[place])

    def counts(self, n_samples: int) -> Counts:
        """Samples of each domain among the first `n_samples` of the stage, int64 (D,)."""
        number, rest = divmod(n_samples, self._block_size)
        counts_D = self._counts_after(number)
        if rest:
            ids = self.block(number).domains_N[:rest]
            counts_D = counts_D + np.bincount(ids, minlength=len(counts_D))
        return counts_D.copy()

    def block(self, number: int) -> Block:
        """Block `number` of the stage; the last one asked for is kept."""
        if self._cached is None or self._cached[0] != number:
            self._cached = number, self._make_block(number)
        return self._cached[1]

    def _make_block(self, number: int) -> Block:
        before_D = self._counts_after(number)
        gained_D = self._counts_after(number + 1) - before_D
        domains_N = np.repeat(np.arange(len(gained_D)), gained_D)
        first_N = np.repeat(np.cumsum(gained_D) - gained_D, gained_D)
        k_N = np.repeat(before_D, gained_D) + np.arange(self._block_size) - first_N
        # Raw Philox output is the same in every version of NumPy; its permutations need not be.
        philox = np.random.Philox(key=self._key, counter=[0, number, 0, 0])
        shuffled_N = domains_N[np.argsort(philox.random_raw(self._block_size), kind="stable")]
        # Each domain's samples come in the order of k, so k_N goes where the stable sort says.
        shuffled_k_N = np.empty_like(k_N)
        shuffled_k_N[np.argsort(shuffled_N, kind="stable")] = k_N
        return Block(shuffled_N, shuffled_k_N)

    def _counts_after(self, blocks: int) -> Counts:
        """Samples of each domain in the first `blocks` blocks."""
        if not 0 <= blocks <= _MOST_SAMPLES // self._block_size:
            raise IndexError(f"block {blocks} is not in the stage")
        latest, counts_D = self._latest
        start = max(done for done in (latest, *self._checkpoints) if done <= blocks)
        if start != latest:
            counts_D = self._checkpoints[start]
        for done in range(start + 1, blocks + 1):
            counts_D = self._one_more_block(counts_D, done * self._block_size)
            if done % self._spacing == 0:
                self._keep(done, counts_D)
        self._latest = blocks, counts_D
        return counts_D

    def _one_more_block(self, counts_D: Counts, n_samples: int) -> Counts:
        """The counts after `n_samples`, from those one block before."""
        quota_D = n_samples * self._weights_D  # in units of 2⁻³⁰ samples
        counts_D = np.maximum(counts_D, quota_D >> _WEIGHT_BITS)
        places = n_samples - int(counts_D.sum())
        if places:
            may = np.flatnonzero(counts_D << _WEIGHT_BITS < quota_D)  # below the ceiling
            per_block = self._weights_D[may] * self._block_size
            deadline = -(-((counts_D[may] + 1) << _WEIGHT_BITS) // per_block)  # in blocks, up
            deficit = quota_D[may] - (counts_D[may] << _WEIGHT_BITS)
            counts_D[may[np.lexsort((-deficit, deadline))[:places]]] += 1
        return counts_D

    def _keep(self, blocks: int, counts_D: Counts) -> None:
        self._checkpoints[blocks] = counts_D
        if len(self._checkpoints) > _CHECKPOINTS:
            self._spacing *= 2
            kept = {b: c for b, c in self._checkpoints.items() if b % self._spacing == 0}
            self._checkpoints = kept
