"""The initial mixture, by the policies that look at nothing but size; and caps on domains."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.config import RunConfig, load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixture.mixture import Mixture
from tests.conftest import overridden


def config_of(settings: dict[str, Any], overrides: dict[str, Any]) -> RunConfig:
    path = Path(settings["run_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(overridden(settings, overrides)))
    return load_config([str(path)])[0]


def initial(settings: dict[str, Any], **fields: Any) -> tuple[Mixture, dict[str, int]]:
    """The first stage's mixture, and the training tokens of each domain."""
    config = config_of(settings, {f"data.{name}": value for name, value in fields.items()})
    data = TrainingData(config)
    tokens = {name: data.manifest.split(name, "train").tokens for name in data.names}
    return data.initial_schedule().mixture(0), tokens


def test_by_size(settings: dict[str, Any]) -> None:
    proportional, tokens = initial(settings, initial_mixture="proportional")
    flat, _ = initial(settings, initial_mixture="temperature", temperature=2.0)
    total, roots = sum(tokens.values()), sum(n**0.5 for n in tokens.values())
    for name, n in tokens.items():
        assert proportional[name] == pytest.approx(n / total, abs=1e-8)
        assert flat[name] == pytest.approx(n**0.5 / roots, abs=1e-8)


def test_unimax_counts_the_epochs_of_the_whole_run(settings: dict[str, Any]) -> None:
    ample, _ = initial(settings, initial_mixture="unimax")
    assert ample.total_variation(Mixture.uniform(ample)) < 1e-8
    drawn = 12 * 8 * 32  # iterations, samples, tokens
    tight, tokens = initial(settings, initial_mixture="unimax", unimax_epochs=drawn / 12_000)
    for name, weight in tight.items():
        assert weight * drawn <= drawn / 12_000 * tokens[name] * (1 + 1e-6)
    with pytest.raises(InputError, match=r"data.initial_mixture unimax: .* raise max_epochs"):
        initial(settings, initial_mixture="unimax", unimax_epochs=0.01)


@pytest.mark.parametrize(
    "remix", [{"policy": "static"}, {"policy": "schedule"}, {"interval_samples": None}]
)
def test_a_cap_on_a_domain_that_is_not_there_is_refused(
    settings: dict[str, Any], tmp_path: Path, remix: dict[str, Any]
) -> None:
    if remix.get("policy") == "schedule":
        stages = [{"start_sample": 0, "weights": {"low": 0.5, "high": 0.25, "junk": 0.25}}]
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(stages))
        remix = {**remix, "schedule": str(tmp_path / "stages.yaml"), "interval_samples": None}
        settings["data"].pop("initial_mixture")
    overrides = {f"remix.{name}": value for name, value in remix.items()}
    config = config_of(settings, overrides | {"remix.constraints.max_epochs": {"lwo": 99.0}})
    words = "remix.constraints.max_epochs: unknown domains lwo; the run's are low, high, junk"
    with pytest.raises(InputError, match=words):
        TrainingData(config).check_repetition(config)
