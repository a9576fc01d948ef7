"""The initial mixture, by the policies that look at nothing but the size of the domains."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tikmix.config import load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import Mixture
from tests.conftest import overridden


def initial(settings: dict[str, Any], **fields: Any) -> tuple[Mixture, dict[str, int]]:
    """The first stage's mixture, and the training tokens of each domain."""
    overrides = {f"data.{name}": value for name, value in fields.items()}
    path = Path(settings["run_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(overridden(settings, overrides)))
    config, _ = load_config([str(path)])
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
