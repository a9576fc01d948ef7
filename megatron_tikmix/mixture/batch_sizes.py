"""BatchSizes: the number of samples in each global batch of a run."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_tikmix.errors import InputError


class BatchSizes:
    """The sizes of consecutive global batches, in steps of batches of one size.

    Args:
        steps: (first sample, batch size) of each step; the first one begins at sample 0, the
            last one has no end.

    Raises:
        InputError: a size is not positive, or a step does not begin where a batch ends.
    """

    def __init__(self, steps: Sequence[tuple[int, int]]) -> None:
        self.steps = tuple((int(start), int(size)) for start, size in steps)
        if not self.steps or self.steps[0][0] != 0:
            raise InputError("batch sizes: the first step must begin at sample 0")
        firsts = [0]
        for (start, size), (end, _) in zip(self.steps, self.steps[1:], strict=False):
            if size < 1 or end <= start or (end - start) % size:
                raise InputError(
                    f"batch sizes: a step from sample {start} to {end} is not a whole number of "
                    f"batches of {size}"
                )
            firsts.append(firsts[-1] + (end - start) // size)
        if self.size < 1:
            raise InputError(f"batch sizes: a batch of {self.size} samples; it must be positive")
        self._firsts = firsts

    @classmethod
    def constant(cls, size: int) -> "BatchSizes":
        """Return sizes that are all `size`."""
        return cls([(0, size)])

    @classmethod
    def ramp_up(cls, start: int, increment: int, samples: int, size: int) -> "BatchSizes":
        """Return Megatron's `rampup_batch_size`: from `start` by `increment` to `size`.

        A batch has start + increment · ⌊consumed / (samples / increments)⌋ samples, and `size`
        once more than `samples` are consumed.

        Raises:
            InputError: the increments do not lead from `start` to `size`.
        """
        if not 0 < start < size or increment < 1 or (size - start) % increment or samples < 1:
            raise InputError(
                f"a batch-size ramp-up [{start}, {increment}, {samples}] does not lead to batches "
                f"of {size}: give a start below that, a positive increment that divides the "
                f"difference, and the samples it takes"
            )
        # In floating point, like megatron-core's calculator.
        per_increment = samples / ((size - start) // increment)
        steps, consumed, current = [(0, start)], 0, start
        while current < size:
            consumed += current
            # The last batch that begins within this step ends it.
            if consumed > samples:
                now = size
            else:
                now = min(start + int(consumed / per_increment) * increment, size)
            if now != current:
                steps.append((consumed, now))
                current = now
        return cls(steps)

    @property
    def size(self) -> int:
        """The batch size of the last step."""
        return self.steps[-1][1]

    @property
    def is_constant(self) -> bool:
        """True if all batches have the same size."""
        return len(self.steps) == 1

    @cached_property
    def _arrays(self) -> NDArray[np.int64]:
        """The first sample, size and number of the first batch of each step, int64 (3, steps)."""
        starts, sizes = zip(*self.steps, strict=True)
        return np.array([starts, sizes, self._firsts], dtype=np.int64)

    def samples_before(self, batches: ArrayLike) -> Any:
        """Return the number of samples in the first `batches` batches; int64, of the same shape."""
        if self.is_constant:
            return batches * self.steps[0][1]  # type: ignore[operator]
        starts, sizes, firsts = self._arrays
        step = np.searchsorted(firsts, batches, side="right") - 1
        return starts[step] + (batches - firsts[step]) * sizes[step]

    def batch_of(self, samples: ArrayLike) -> Any:
        """Return the number of the batch that contains each sample; int64, of the same shape."""
        if self.is_constant:
            return samples // self.steps[0][1]  # type: ignore[operator]
        starts, sizes, firsts = self._arrays
        step = np.searchsorted(starts, samples, side="right") - 1
        return firsts[step] + (samples - starts[step]) // sizes[step]

    def size_at(self, sample: int) -> int:
        """Return the size of the batch that contains a sample."""
        return next(size for start, size in reversed(self.steps) if start <= sample)

    def is_end(self, samples: int) -> bool:
        """Return whether a batch ends after the first `samples` samples."""
        return samples >= 0 and int(self.samples_before(self.batch_of(samples))) == samples

    def end_from(self, samples: int) -> int:
        """Return the first end of a batch at `samples` or later."""
        if self.is_end(samples):
            return samples
        return int(self.samples_before(self.batch_of(samples) + 1))

    def after(self, samples: int) -> "BatchSizes":
        """Return the sizes from the end of a batch at `samples` on, counted from there."""
        if self.is_constant:
            return self
        steps = [(max(start - samples, 0), size) for start, size in self.steps]
        return BatchSizes(steps[sum(start <= samples for start, _ in self.steps) - 1 :])

    def to_json(self) -> list[list[int]]:
        """Return the steps as plain values."""
        return [list(step) for step in self.steps]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BatchSizes) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)
