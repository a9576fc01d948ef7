"""One run, as nested dataclasses: what YAML files and ``--section.field value`` fill in.

Sections ``model``, ``optimizer`` and ``ddp`` are megatron-core's own configuration classes;
every field they have can be set. The other sections are declared here. A field's docstring
is what ``--help`` shows.
"""

from megatron_tikmix.config.command_line import build_parser, launched_world, load_config
from megatron_tikmix.config.model import GPTConfig
from megatron_tikmix.config.remix import AuditConfig, ConstraintsConfig, RemixConfig, RolloutConfig
from megatron_tikmix.config.run import RunConfig
from megatron_tikmix.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    HostedConfig,
    MixtureSections,
    ParametersConfig,
    ProbeConfig,
    SchedulerConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "AuditConfig",
    "CheckpointConfig",
    "ConstraintsConfig",
    "DataConfig",
    "EvaluateConfig",
    "GPTConfig",
    "HostedConfig",
    "MixtureSections",
    "ParametersConfig",
    "ProbeConfig",
    "RemixConfig",
    "RolloutConfig",
    "RunConfig",
    "SchedulerConfig",
    "TaskConfig",
    "TrainConfig",
    "build_parser",
    "launched_world",
    "load_config",
]
