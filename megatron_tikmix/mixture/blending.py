"""Blending: integer weights -> interleaved domains, in blocks, without an index.

The samples of a stage are divided into blocks, the global batches. After n samples, n at the end of
a block, ⌊n·w_j⌋ or ⌈n·w_j⌉ of them are of domain j. In every block each domain first gets the
samples that bring it to the floor, and the remaining places go to the domains whose next sample has
the earliest deadline. This is earliest-deadline-first scheduling of unit jobs: the k-th sample of
domain j may be drawn from the first block with n·w_j > k − 1 on, and must be drawn by the end of
the first one with n·w_j ≥ k. Spreading every domain evenly is a fractional schedule, so one in
whole samples exists, and earliest deadline first finds it: the floors never need more places than a
block has. (Serving the largest deficits first fails: it can leave more domains at their limit than
a block has places.)

A block depends on the one before only through early samples, drawn before the next block needs
them. Without early samples the counts after a block depend on its number alone, so runs of blocks
can be skipped: a domain that is due in every block (n·w_j rises by 1 or more) is never early, and
the places that the floors leave go to the largest remainders.

All arithmetic is exact, on int64.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.mixture import WEIGHT_TOTAL

Counts = NDArray[np.int64]

_WEIGHT_BITS = WEIGHT_TOTAL.bit_length() - 1
_MOST_SAMPLES = 2**63 // WEIGHT_TOTAL - 1  # so that samples × weights fits an int64
_CHECKPOINTS = 32
_AT_ONCE = 2**16  # blocks × domains that are skipped at once
_WORTHWHILE = 8  # blocks; fewer are faster one by one


class Block(NamedTuple):
    """One block of a stage, in the order its samples are drawn."""

    domains_N: NDArray[np.int64]
    """Domain index of each sample."""

    k_N: NDArray[np.int64]
    """The number of earlier samples of this stage from the same domain."""


class StageBlend:
    """The order of the domains within a stage: a pure function of weights, block size, seed, stage.

    It allows random access: counts are kept for at most 32 blocks, evenly spread over those
    visited, and others are computed from the nearest one before; memory is O(D + N).

    Args:
        integer_weights: int (D,), zero or more, sum 2³⁰ (``Mixture.integer_weights``).
        block_size: N, samples of a block: one number, or the sizes of the stage's blocks.
        seed: fixes the order within the blocks, 0 to 2⁶⁴ − 1.
        stage: index of the stage; every stage has an order of its own.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        integer_weights: ArrayLike,
        block_size: int | BatchSizes,
        seed: int,
        stage: int = 0,
    ) -> None:
        self._weights_D = np.array(integer_weights, dtype=np.int64)
        if (self._weights_D < 0).any() or self._weights_D.sum() != WEIGHT_TOTAL:
            raise InputError(
                f"integer weights must be zero or more and sum to {WEIGHT_TOTAL}; "
                "take them from Mixture.integer_weights()"
            )
        if isinstance(block_size, int):
            if not 0 < block_size <= _MOST_SAMPLES:
                raise InputError(
                    f"block_size is {block_size}; it must be a positive number of samples"
                )
            block_size = BatchSizes.constant(block_size)
        if not 0 <= seed < 2**64:
            raise InputError(f"seed is {seed}; it must be from 0 to 2**64 - 1")
        self._blocks = block_size
        self._key = np.array([seed, stage], dtype=np.uint64)
        self._checkpoints = {0: np.zeros_like(self._weights_D)}  # blocks -> counts after them
        self._spacing = 1
        self._latest = (0, self._checkpoints[0])
        self._cached: tuple[int, Block] | None = None
        self._most = self._reach = max(_AT_ONCE // len(self._weights_D), 1)  # blocks at once

    def locate(self, index: int) -> tuple[int, int]:
        """Return the domain of sample `index`, and the number of earlier samples from it.

        Raises:
            IndexError: `index` is negative, or beyond the 2³³ − 1 samples a stage can hold.
        """
        number = int(self._blocks.batch_of(index))
        block = self.block(number)
        place = index - int(self._blocks.samples_before(number))
        return int(block.domains_N[place]), int(block.k_N[place])

    def locate_many(self, index_N: NDArray[np.int64]) -> Block:
        """Do :meth:`locate` for many samples, in any order; return int64 (N,) each.

        The cost is that of the blocks that contain them, each computed once.
        """
        if not len(index_N):
            return Block(index_N, index_N)
        number = int(self._blocks.batch_of(int(index_N.min())))
        if number == int(self._blocks.batch_of(int(index_N.max()))):  # as a rule
            place_N = index_N - int(self._blocks.samples_before(number))
            block = self.block(number)
            return Block(block.domains_N[place_N], block.k_N[place_N])
        number_N = self._blocks.batch_of(index_N)
        place_N = index_N - self._blocks.samples_before(number_N)
        found = Block(np.empty_like(index_N), np.empty_like(index_N))
        order_N = np.argsort(number_N, kind="stable")
        numbers, firsts = np.unique(number_N[order_N], return_index=True)
        for number, of_block in zip(numbers.tolist(), np.split(order_N, firsts[1:]), strict=True):
            block = self.block(number)
            found.domains_N[of_block] = block.domains_N[place_N[of_block]]
            found.k_N[of_block] = block.k_N[place_N[of_block]]
        return found

    def counts(self, n_samples: int) -> Counts:
        """Return each domain's samples among the first `n_samples` of the stage, int64 (D,)."""
        number = int(self._blocks.batch_of(n_samples))
        rest = n_samples - int(self._blocks.samples_before(number))
        counts_D = self._counts_after(number)
        if rest:
            ids = self.block(number).domains_N[:rest]
            counts_D = counts_D + np.bincount(ids, minlength=len(counts_D))
        return counts_D.copy()

    def check_counts(self, n_samples: int, counts_D: Counts) -> bool:
        """Return whether these can be the counts after `n_samples`: all within one of the quota."""
        quota_D = n_samples * self._weights_D
        floor_D = quota_D >> _WEIGHT_BITS
        ceiling_D = -(-quota_D >> _WEIGHT_BITS)
        within = (floor_D <= counts_D) & (counts_D <= ceiling_D)
        return bool(within.all()) and int(counts_D.sum()) == n_samples

    def resume(self, n_samples: int, counts_D: Counts) -> None:
        """Continue from known counts at the end of a block, without computing them again.

        Raises:
            InputError: they cannot be the counts after `n_samples`.
        """
        if not self._blocks.is_end(n_samples) or not self.check_counts(n_samples, counts_D):
            raise InputError(
                f"the domain counts stored after {n_samples} samples of a stage do not follow its "
                f"mixture"
            )
        blocks = int(self._blocks.batch_of(n_samples))
        self._latest = blocks, counts_D.copy()

    def block(self, number: int) -> Block:
        """Return block `number` of the stage; the latest one is kept."""
        if self._cached is None or self._cached[0] != number:
            self._cached = number, self._make_block(number)
        return self._cached[1]

    def _make_block(self, number: int) -> Block:
        before_D = self._counts_after(number)
        gained_D = self._counts_after(number + 1) - before_D
        size = int(gained_D.sum())
        domains_N = np.repeat(np.arange(len(gained_D)), gained_D)
        first_N = np.repeat(np.cumsum(gained_D) - gained_D, gained_D)
        k_N = np.repeat(before_D, gained_D) + np.arange(size) - first_N
        # Raw Philox output is the same in every version of NumPy; permutations may not be.
        philox = np.random.Philox(key=self._key, counter=[0, number, 0, 0])
        shuffled_N = domains_N[np.argsort(philox.random_raw(size), kind="stable")]
        # Each domain's samples are drawn in the order of k, which the stable sort keeps.
        # NumPy sorts 16 bits by radix, several times faster.
        keys_N = shuffled_N.astype(np.uint16) if len(gained_D) <= 2**16 else shuffled_N
        shuffled_k_N = np.empty_like(k_N)
        shuffled_k_N[np.argsort(keys_N, kind="stable")] = k_N
        return Block(shuffled_N, shuffled_k_N)

    def _counts_after(self, blocks: int) -> Counts:
        """Return each domain's samples in the first `blocks` blocks."""
        if blocks < 0 or int(self._blocks.samples_before(blocks)) > _MOST_SAMPLES:
            raise IndexError(f"block {blocks} is not in the stage")
        latest, counts_D = self._latest
        done = max(done for done in (latest, *self._checkpoints) if done <= blocks)
        if done != latest:
            counts_D = self._checkpoints[done]
        while done < blocks:
            # Skip as far as possible, but not beyond the next checkpoint.
            until = min(blocks, (done // self._spacing + 1) * self._spacing)
            done, counts_D = self._further(done, counts_D, until)
            if done % self._spacing == 0 and done not in self._checkpoints:
                self._keep(done, counts_D)
        self._latest = blocks, counts_D
        return counts_D

    def _further(self, done: int, counts_D: Counts, until: int) -> tuple[int, Counts]:
        """Return a number of blocks above `done`, at most `until`, and the counts after them."""
        until = min(until, done + self._reach)
        if until - done >= _WORTHWHILE:
            passed = self._pass_over(done, counts_D, until)
            whole = passed is not None and passed[0] == until
            # The blocks beyond an early sample were computed for nothing: try fewer next time.
            self._reach = min(2 * self._reach, self._most) if whole else _WORTHWHILE
            if passed is not None:
                return passed
        until = min(until, done + _WORTHWHILE)
        for block in range(done + 1, until + 1):
            counts_D = self._one_more_block(counts_D, block)
        return until, counts_D

    def _pass_over(self, done: int, counts_D: Counts, until: int) -> tuple[int, Counts] | None:
        """Skip to the last block, at most `until`, before which no sample is early.

        Return its number and the counts after it, or None if it is `done` itself.
        """
        n_B = self._blocks.samples_before(np.arange(done + 1, until + 2))
        if int(n_B[-1]) > _MOST_SAMPLES:
            return None
        quota_BD = n_B[:, None] * self._weights_D  # in units of 2⁻³⁰ samples
        floor_BD = quota_BD >> _WEIGHT_BITS
        if (counts_D > floor_BD[0]).any():
            return None  # a domain has samples that only later blocks need
        places_B = n_B[:-1] - floor_BD[:-1].sum(axis=1)
        # The places that the floors leave may go only to domains that the next block needs.
        below_BD = (quota_BD[:-1] & (WEIGHT_TOTAL - 1)) != 0
        due_BD = below_BD & (floor_BD[1:] > floor_BD[:-1])
        enough_B = np.count_nonzero(due_BD, axis=1) >= places_B
        blocks = len(enough_B) if enough_B.all() else int(np.argmin(enough_B))
        if blocks == 0:
            return None
        last = blocks - 1
        counts_D, places = floor_BD[last].copy(), int(places_B[last])
        if places:
            due = np.flatnonzero(due_BD[last])
            deficit = quota_BD[last, due] & (WEIGHT_TOTAL - 1)
            counts_D[due[np.argsort(-deficit, kind="stable")[:places]]] += 1
        return done + blocks, counts_D

    def _one_more_block(self, counts_D: Counts, number: int) -> Counts:
        """Return the counts after `number` blocks, from those one block before."""
        n_samples = int(self._blocks.samples_before(number))
        quota_D = n_samples * self._weights_D  # in units of 2⁻³⁰ samples
        counts_D = np.maximum(counts_D, quota_D >> _WEIGHT_BITS)
        places = n_samples - int(counts_D.sum())
        if places:
            open_domains = np.flatnonzero(counts_D << _WEIGHT_BITS < quota_D)  # below the ceiling
            weights = self._weights_D[open_domains]
            # The block by whose end the quota reaches the next sample.
            needed_at = -(-((counts_D[open_domains] + 1) << _WEIGHT_BITS) // weights)
            deadline = self._blocks.batch_of(needed_at - 1)
            last = np.partition(deadline, places - 1)[places - 1]
            soon = open_domains[deadline < last]
            counts_D[soon] += 1
            at_last = open_domains[deadline == last]
            deficit = quota_D[at_last] - (counts_D[at_last] << _WEIGHT_BITS)
            counts_D[at_last[np.argsort(-deficit, kind="stable")[: places - len(soon)]]] += 1
        return counts_D

    def _keep(self, blocks: int, counts_D: Counts) -> None:
        self._checkpoints[blocks] = counts_D
        if len(self._checkpoints) > _CHECKPOINTS:
            self._spacing *= 2
            kept = {b: c for b, c in self._checkpoints.items() if b % self._spacing == 0}
            self._checkpoints = kept
