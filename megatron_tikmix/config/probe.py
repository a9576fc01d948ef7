"""Section `probe`: how influence is measured."""

import fnmatch
import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_tikmix.config.requirement import require


@dataclass(kw_only=True)
class ParametersConfig:
    """Which parameters influence is measured on, by patterns on their names in the whole model.

    Names are GPTModel's, layers counted from 0 over all pipeline stages:
    `embedding.word_embeddings.weight`, `decoder.layers.3.mlp.linear_fc1.weight`. In a pattern `*`
    stands for any characters, dots too.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    """Measure on parameters that match one of these."""

    exclude: list[str] = field(default_factory=list)
    """But not on parameters that match one of these: `embedding.*`, `output_layer.*`."""

    def __post_init__(self) -> None:
        require(bool(self.include), "probe.parameters.include", "must have a pattern")

    def selects(self, name: str) -> bool:
        """Whether influence is measured on the parameter of this name."""
        included, excluded = (
            any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            for patterns in (self.include, self.exclude)
        )
        return included and not excluded


@dataclass(kw_only=True)
class ProbeConfig:
    """The influence probe at each boundary."""

    data_parallel_mode: Literal["sharded", "replicated"] = "sharded"
    """`sharded`: every sub-batch is spread over the data-parallel ranks and its gradient
    reduce-scattered, as in training; each rank keeps its slice of the validation gradients.
    `replicated`: each rank keeps them whole, takes sub-batches of its own, and no gradient of a
    domain is sent at all. Both give the same matrix."""

    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type in which validation gradients are kept; inner products are summed in float64."""

    task_group_size: int | None = None
    """`replicated` only: keep the whole gradients of so many tasks at a time, and pass through
    the domains again for each group. None: all tasks at once."""

    parameters: ParametersConfig = field(default_factory=ParametersConfig)

    curvature: Literal["adam", "squared_gradients", "identity"] = "adam"
    """Inverse curvature: `adam` (the optimizer's damped second moment; before its first step
    `squared_gradients`), `squared_gradients` (the probe's own, of one sub-batch of each domain)
    or `identity`."""

    damping: float = 0.1
    """Damping of `adam` and `squared_gradients`, relative to the mean of sqrt(second moment)."""

    sub_batches: int = 8
    """Sub-batches of each domain; standard errors come from their spread."""

    sub_batch_samples: int = 8
    """Samples of one sub-batch, over all data-parallel ranks."""

    task_samples: int = 64
    """At most so many samples of each task decide (the others report); with remix.influence joint
    also of each domain's own gradient."""

    max_overhead: float | None = 0.25
    """A probe may take at most so many tokens, relative to those of an interval: sub_batches is
    lowered to fit, and what cannot fit is refused before training. None: no limit."""

    precision: float | None = None
    """Adaptive budget: add sub-batches where they matter, beyond `sub_batches`, until noise moves
    the mixture solved by no more than this in total variation, and a fresh batch confirms it.
    None: `sub_batches` of each domain, and no more."""

    max_tokens: int | None = None
    """`precision` only: the most tokens of one probe. None: what max_overhead leaves."""

    seed: int = 4321
    """Seed of the probe's own sample stream, apart from training's."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.damping) and self.damping > 0, "probe.damping", "must be positive"
        )
        require(
            self.task_group_size is None or self.task_group_size > 0,
            "probe.task_group_size",
            "must be positive",
        )
        require(
            self.task_group_size is None or self.data_parallel_mode == "replicated",
            "probe.task_group_size",
            "bounds the memory of data_parallel_mode replicated only; leave it out",
        )
        require(self.sub_batches >= 8, "probe.sub_batches", "must be at least 8 for honest errors")
        require(
            self.precision is None or 0 < self.precision < 1,
            "probe.precision",
            "must be between 0 and 1",
        )
        require(
            self.max_tokens is None or (self.max_tokens > 0 and self.precision is not None),
            "probe.max_tokens",
            "must be positive, and goes with probe.precision",
        )
        require(
            self.precision is None or (self.max_tokens or self.max_overhead) is not None,
            "probe.precision",
            "needs a limit: probe.max_tokens or probe.max_overhead",
        )
        for name in ("sub_batch_samples", "task_samples"):
            require(getattr(self, name) > 0, f"probe.{name}", "must be positive")
        require(
            self.max_overhead is None or self.max_overhead > 0,
            "probe.max_overhead",
            "must be positive, or null for no limit",
        )
