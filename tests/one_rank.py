"""A run of one rank in this process, trained for a few steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.config import load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.training.build import build
from megatron_tikmix.training.loop import Run, train_interval
from megatron_tikmix.training.record import Recorder
from tests.conftest import let_go_of_models, overridden
from tests.influence_reference import DAMPING


@pytest.fixture(params=["adam", "identity"])
def trained(
    request: pytest.FixtureRequest, settings: dict[str, Any], tmp_path: Path
) -> Iterator[Run]:
    """A run of one rank after a few steps, so that there is a second moment."""
    settings = overridden(
        settings,
        {
            "probe.curvature": request.param,
            # 4 samples a sub-batch in micro-batches of 3: the second one is padded.
            "train.micro_batch_size": 3,
            "train.global_batch_size": 6,
            "remix.interval_samples": 24,
        },
    )
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=4)
        yield run


@contextmanager
def one_rank(settings: dict[str, Any], folder: Path) -> Iterator[Run]:
    """The run of these settings, built in this process."""
    settings = overridden(settings, {"probe.damping": DAMPING, "train.log_interval": 100})
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    config, resolved = load_config([str(path)])
    config.check(1)
    parallel = initialize(config.model, config.seed, 5)
    try:
        recorder = Recorder(config, resolved, parallel)
        yield build(config, TrainingData(config), recorder, parallel)
    finally:
        shut_down()
        let_go_of_models()
