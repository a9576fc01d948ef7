"""Sections `remix`, `rollout` and `audit`: when and how the mixture is reset."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from megatron_tikmix.config.ranges import (
    AtLeast4,
    AtLeast16,
    FromZeroToBelowOne,
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    check_ranges,
)
from megatron_tikmix.errors import InputError, require
from megatron_tikmix.solve.constraints import MixtureConstraints
from megatron_tikmix.solve.objective import Gain, Preset


@dataclass(frozen=True, kw_only=True)
class ConstraintsConfig(MixtureConstraints):
    """Limits that every mixture decided at a boundary must respect."""

    pareto: bool = False
    """No task may gain less than under the mixture in force: S w ≥ S w_prior in every row. Always
    so with remix.preset paper."""

    max_epochs: PositiveFloat | dict[str, PositiveFloat] | None = None
    """Passes over a domain's training tokens, counted over the whole run, that no reset may plan
    to exceed: one for all domains, or by name. It becomes an upper bound on the weight, from the
    tokens that are left and the length of the next interval."""

    def __post_init__(self) -> None:
        check_ranges("remix.constraints", self)
        for name in ("confidence", "pareto_slack"):
            require(
                self.pareto or not getattr(self, name),
                f"remix.constraints.{name}",
                "is about Pareto: set remix.constraints.pareto true, or leave it out",
            )
        try:
            super().__post_init__()
        except InputError as error:
            raise InputError(f"remix.constraints.{error}") from None


@dataclass(kw_only=True)
class RemixConfig:
    """When and how the mixture is reset."""

    policy: Literal["tikmix_d", "tikmix_m", "static", "schedule"] = "tikmix_d"
    """`tikmix_d` solves for the mixture at every boundary, `tikmix_m` goes on from its answer with
    a surrogate fitted to measured candidates; `static` keeps the initial one; `schedule` follows
    the stages of the file or run named by `schedule`."""

    interval_samples: int | None = None
    """Samples of one interval, a whole number of global batches. None: no boundary at all. During a
    batch-size ramp-up an interval ends with the batch that reaches its end."""

    schedule: str | None = None
    """`policy: schedule`: a YAML or JSON list of stages (`start_sample`, `weights`), or the run_dir
    or ledger (mixture.jsonl) of a run to follow. It replaces interval_samples and
    data.initial_mixture."""

    first_interval_samples: int | None = None
    """Samples of the first interval, on the initial mixture, where it is to be shorter or longer
    than the others: what is trained on a bad mixture is lost. None: interval_samples."""

    start: int | float = 0
    """No reset before this iteration, or before this share of training (a number with a point, up
    to 1.0)."""

    stop: int | float | None = None
    """No reset after this iteration, or after this share of training. None: no limit."""

    in_lr_decay: bool = False
    """Also reset during the final learning-rate decay of a WSD schedule."""

    mode: Literal["apply", "advise"] = "apply"
    """`advise`: measure and solve at each boundary, log the answer, and keep the mixture."""

    alpha: NonNegativeFloat = 1.0
    """Weight of uniformity over tasks, std(gain)."""

    beta: NonNegativeFloat = 1.0
    """Weight of the gain summed over tasks."""

    gamma: NonNegativeFloat = 1.0
    """Weight of the mixture's diversity."""

    preset: Preset | None = "default"
    """`paper`: as published: the raw sum over tasks, and influence, gain, diversity_reference and
    smoothing at the values given there, and Pareto. `default`: what None stands for elsewhere."""

    influence: Literal["joint", "marginal"] | None = None
    """`marginal`: of each domain by itself, to first order, as published. `joint`: each task's
    gradient is fitted by those of all domains together, so that near-duplicates share their credit
    and what only has the right words gets little. It keeps a gradient of each domain too: the
    memory and passes of as many more tasks. None: joint; marginal with preset paper."""

    gain: Gain | None = None
    """`linear` in a mixture's influence on a task, or its `log`arithm, since gains saturate: what a
    task gets much of already is worth less to it. None: log; linear with preset paper."""

    diversity_reference: Literal["uniform", "proportional", "prior"] | None = None
    """What diversity is measured from: `uniform` (entropy), `proportional` to training tokens, or
    `prior`, the mixture in force; the last two as KL divergence. None: prior, so that answers
    accumulate over boundaries and noise averages out; uniform with preset paper. In `prior` a
    domain counts for at least 1e-4 of the uniform weight, so that one that was left out can return:
    to leave it out for good, use `constraints`."""

    smoothing: FromZeroToBelowOne | None = None
    """Weight of former boundaries in an exponential average of influence, 0 (none) to below 1.
    None: 0.5; 0 with preset paper."""

    constraints: ConstraintsConfig = field(default_factory=ConstraintsConfig)

    measure: Literal["gradient", "rollout"] = "rollout"
    """tikmix_m: how candidates are measured: `rollout`, by training on each for a while (section
    `rollout`), or `gradient`, by their influence, which costs nothing more."""

    candidates: AtLeast16 = 48
    """tikmix_m: how many candidate mixtures are measured."""

    require_audit: bool = False
    """Keep the mixture in force where the audit finds it better than the new one, or fails (section
    `audit`); not where the mixture in force breaks a constraint."""

    def __post_init__(self) -> None:
        check_ranges("remix", self)
        require(
            self.preset != "paper" or self.gain in (None, "linear"),
            "remix.gain",
            "is linear with remix.preset paper",
        )
        require(
            (self.policy == "schedule") == (self.schedule is not None),
            "remix.schedule",
            "goes with remix.policy schedule, and that needs it",
        )
        for name in ("start", "stop"):
            value = getattr(self, name)
            require(
                value is None or (value >= 0 and (isinstance(value, int) or value <= 1)),
                f"remix.{name}",
                f"({value}) must be an iteration (a whole number), or a share of training from "
                f"0.0 to 1.0",
            )

    @property
    def max_epochs(self) -> float | dict[str, float] | None:
        """The limit to passes over a domain, of `constraints`."""
        return self.constraints.max_epochs

    def settled(self) -> "RemixConfig":
        """The same, with what is None given by the preset."""
        paper = self.preset == "paper"
        given: dict[str, Any] = {
            "influence": "marginal" if paper else "joint",
            "gain": "linear" if paper else "log",
            "diversity_reference": "uniform" if paper else "prior",
            "smoothing": 0.0 if paper else 0.5,
        }
        chosen = {name: value for name, value in given.items() if getattr(self, name) is None}
        if paper and not self.constraints.pareto:
            chosen["constraints"] = replace(self.constraints, pareto=True)
        return replace(self, preset=self.preset or "default", **chosen)


@dataclass(kw_only=True)
class RolloutConfig:
    """Short real continuations of training, undone afterwards, that measure a candidate mixture."""

    iters: PositiveInt = 40
    """Optimizer steps of each."""

    repetitions: PositiveInt = 1
    """How often each candidate is measured, on fresh samples."""

    def __post_init__(self) -> None:
        check_ranges("rollout", self)


@dataclass(kw_only=True)
class AuditConfig:
    """Rollouts of the old and the new mixture at a boundary, against what influence predicted."""

    enabled: bool = False
    """Make one whenever the mixture is to change."""

    iters: PositiveInt = 40
    """Optimizer steps of each rollout."""

    repetitions: AtLeast4 = 4
    """Pairs of rollouts, each pair on fresh samples; at least 4, for an interval."""

    confidence: OpenUnitInterval = 0.95
    """Of the interval that a difference must be outside of to count."""

    def __post_init__(self) -> None:
        check_ranges("audit", self)
