"""Sections `data`, `tasks` and `evaluate`."""

from dataclasses import dataclass
from typing import Literal

import torch

from megatron_tikmix.config.requirement import require


@dataclass(kw_only=True)
class DataConfig:
    """Training domains."""

    manifest: str
    """The domain manifest (YAML) that tools/preprocess_data.py wrote."""

    sequence_length: int = 1024
    """Tokens of one sample."""

    domains: list[str] | None = None
    """Train on these domains of the manifest only (default: all of them)."""

    initial_mixture: (
        Literal["uniform", "proportional", "temperature", "unimax"] | dict[str, float]
    ) = "proportional"
    """Mixture of the first interval, and of the whole run with remix.policy static: `uniform`,
    `proportional` to training tokens, `temperature` (proportional to tokens^(1/temperature)),
    `unimax` (as uniform as unimax_epochs over the whole run allow), or weights by domain name."""

    temperature: float = 2.0
    """`initial_mixture: temperature`: 1 is proportional, larger is nearer to uniform."""

    unimax_epochs: float = 4.0
    """`initial_mixture: unimax`: the most passes over a domain in the whole run."""

    num_workers: int | None = None
    """Data-loading worker processes of each rank. None: 2 where there is a GPU, and none without,
    where reading samples takes a small part of a step."""

    path_to_cache: str | None = None
    """Where the indices of large domains' epochs are kept, for all ranks and later runs; it must be
    a folder that all nodes see. None: RUN_DIR/cache. Small domains have none on disk."""

    reset_attention_mask: bool = False
    """Intra-document masking: no token attends to an earlier document of its sample."""

    reset_position_ids: bool = False
    """Count positions anew in every document of a sample (matters to position_embedding_type
    learned_absolute only)."""

    eod_mask_loss: bool = False
    """Leave out the loss where the input is an end-of-document token."""

    def __post_init__(self) -> None:
        require(self.sequence_length > 0, "data.sequence_length", "must be positive")
        require(self.domains != [], "data.domains", "must name a domain, or be left out for all")
        if self.num_workers is None:
            self.num_workers = 2 if torch.cuda.is_available() else 0
        require(self.num_workers >= 0, "data.num_workers", "must not be negative")


@dataclass(kw_only=True)
class TaskConfig:
    """A validation task: give one of `domain`, `prefix` and `prompts`."""

    domain: str | None = None
    """The domain whose `validation` split is measured."""

    prefix: str | None = None
    """PREFIX.bin and PREFIX.idx are measured: further held-out text, made with the manifest's
    tokenizer."""

    prompts: str | None = None
    """A JSONL file (plain, .gz, .bz2, .xz or .zst) of prompts and completions, of which the
    completions are measured. Tokenised at the start with the manifest's tokenizer."""

    prompt_field: str = "prompt"
    """`prompts`: the field that holds the prompt."""

    completion_field: str = "completion"
    """`prompts`: the field that holds the completion."""

    weight: float = 1.0
    """What this task counts for in the decision, relative to the others."""

    decides: bool = True
    """False: the task is measured and reported, and no mixture is decided on it."""

    def check(self, name: str) -> None:
        """Refuse a task that is given by more or less than one of its three fields."""
        kinds = [kind for kind in ("domain", "prefix", "prompts") if getattr(self, kind)]
        require(
            len(kinds) == 1,
            f"tasks.{name}",
            f"must have one of domain, prefix and prompts, and has {' and '.join(kinds) or 'none'}",
        )


@dataclass(kw_only=True)
class EvaluateConfig:
    """Validation loss at every boundary and at the end, on items that do not decide."""

    task_samples: int = 64
    """At most so many samples of each task are measured."""

    def __post_init__(self) -> None:
        require(self.task_samples > 0, "evaluate.task_samples", "must be positive")
