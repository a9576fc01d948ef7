"""The configuration: overrides, round trip, help, and derived fields."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.enums import AttnBackend

from megatron_tikmix.config import (
    ConstraintsConfig,
    ProbeConfig,
    RemixConfig,
    TrainConfig,
    load_config,
)
from megatron_tikmix.config.checks import TORCH_ATTENTION, UNSUPPORTED
from megatron_tikmix.errors import InputError


@pytest.fixture
def path(settings: dict[str, Any], tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return str(file)


def test_the_resolved_configuration_gives_the_same_run(path: str, tmp_path: Path) -> None:
    """Every field is in it, those of megatron-core too."""
    arguments = [path, "--model.qk_layernorm", "true", "--optimizer.lr", "0.5"]
    config, resolved = load_config(arguments)
    again = tmp_path / "resolved.yaml"
    again.write_text(resolved)
    config_again, resolved_again = load_config([str(again)])
    assert yaml.safe_load(resolved_again) == yaml.safe_load(resolved)
    assert config_again.model.qk_layernorm
    assert config_again.optimizer == config.optimizer
    assert config_again.train == config.train
    assert yaml.safe_load(resolved)["optimizer"]["lr"] == 0.5


def test_the_command_line_overrides_the_file(path: str) -> None:
    config, _ = load_config([path, "--train.train_iters", "77", "--run_dir", "elsewhere"])
    assert (config.train.train_iters, config.run_dir) == (77, "elsewhere")
    assert config.train.micro_batch_size == 2, "the rest is the file's"


def test_bf16_settles_every_type(path: str) -> None:
    config, resolved = load_config([path, "--model.bf16", "true"])
    assert config.model.params_dtype == config.model.pipeline_dtype == torch.bfloat16
    assert config.optimizer.bf16
    assert config.optimizer.params_dtype == torch.bfloat16
    written = yaml.safe_load(resolved)
    assert written["optimizer"]["bf16"]
    assert written["model"]["params_dtype"] == "torch.bfloat16"
    assert written["ddp"]["grad_reduce_in_fp32"]


def test_the_distributed_optimizer_is_always_used(path: str) -> None:
    config, _ = load_config([path])
    assert config.optimizer.use_distributed_optimizer
    assert config.ddp.use_distributed_optimizer


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.num_layer", "3"], "did you mean model.num_layers?"),
        (["--remix.interval_sample", "3"], "did you mean remix.interval_samples?"),
        (["--remix.policy", "magic"], "remix.policy"),
        (["--remix.gamma", "-1"], "remix.gamma (-1) must be at least 0 and finite"),
        (["--remix.constraints.max_total_variation", "0"], "remix.constraints.max_total_variation"),
        (["--tasks", "{}"], "tasks must name"),
        (["--tasks", "{'a b': {domain: low}}"], "tasks.a b"),
        (["--scheduler.lr_decay_style", "WSD"], "lr_wsd_decay_iters"),
        (["--model.num_attention_heads", "0"], "model.num_attention_heads must be given"),
        (["--model.hidden_dropout", "2"], "model.hidden_dropout"),
        (["--model.sequence_parallel", "true"], "model.sequence_parallel needs tensor_model"),
        (["--seed", "-5"], "seed (-5) must be at least 0 and below 4294967296"),
        (["--train.exit_interval", "0"], "train.exit_interval (0) must be above 0"),
        (["--probe.precision", "1"], "probe.precision (1) must be above 0 and below 1"),
        (["--tasks.low.weight", "0"], "tasks.low.weight must be positive"),
        (["--nope", "1"], "unknown configuration field nope; see --help"),
        (["--remix.preset", "paper", "--tasks.low.weight", "2"], "tasks.low.weight"),
        (["--remix.preset", "paper", "--remix.gain", "log"], "remix.gain is linear"),
        (["--remix.constraints.confidence", "0.9"], "set remix.constraints.pareto true"),
        (["--tasks", "{low: {domain: low, decides: false}}"], "tasks must have at least one"),
    ],
)
def test_refusals(path: str, arguments: list[str], words: str) -> None:
    with pytest.raises(InputError, match="(?s)" + re.escape(words)) as caught:
        load_config([path, *arguments])
    assert "\n" not in str(caught.value)


USED = {
    "model.context_parallel_size": 2,
    "model.expert_model_parallel_size": 2,
    "model.num_moe_experts": 4,
    "model.mtp_num_layers": 1,
    "model.multi_latent_attention": True,
    "model.fp16": True,
    "model.fp8": "hybrid",
    "model.fp4": "nvfp4",
    "model.cross_entropy_loss_fusion": True,
    "ddp.use_megatron_fsdp": True,
    "ddp.num_distributed_optimizer_instances": 2,
    "ddp.average_in_collective": True,
    "optimizer.optimizer": "sgd",
    "optimizer.optimizer_cpu_offload": True,
    "optimizer.use_precision_aware_optimizer": True,
}


def test_what_cannot_be_used_yet_is_refused_by_name_with_the_reason(path: str) -> None:
    config, _ = load_config([path])
    config.check(1)
    assert set(USED) == set(UNSUPPORTED)
    for name, value in USED.items():
        section, field = name.split(".")
        if not hasattr(getattr(config, section), field):
            continue  # of a newer megatron-core
        used = copy.deepcopy(config)
        setattr(getattr(used, section), field, value)
        reason = UNSUPPORTED[name][1]
        with pytest.raises(InputError, match=rf"{name} is not supported yet: {reason}"):
            used.check(1)


OF_LOCAL_ATTENTION = {
    "window_size": (8, 0),
    "softmax_type": "off-by-one",
    "attention_softmax_in_fp32": False,
    "masked_softmax_fusion": True,
    "deterministic_mode": True,
}


@pytest.mark.parametrize("field", TORCH_ATTENTION)
def test_what_torchs_attention_has_not_is_refused(field: str, path: str) -> None:
    config, _ = load_config([path])
    setattr(config.model, field, OF_LOCAL_ATTENTION[field])
    config.check(1)
    config.model.attention_backend = AttnBackend.flash
    with pytest.raises(InputError, match=rf"model.{field} .* or set model.attention_backend local"):
        config.check(1)
    setattr(config.model, field, TORCH_ATTENTION[field])
    config.check(1)


def test_transformer_engine_has_no_local_attention(path: str) -> None:
    config, _ = load_config([path, "--model.attention_backend", "local"])
    config.check(1)
    config.model.transformer_impl = "transformer_engine"
    with pytest.raises(InputError, match=r"model.attention_backend local needs model.transformer"):
        config.check(1)


def test_sequence_parallelism_needs_a_sequence_that_tensor_ranks_divide(path: str) -> None:
    layout = ["--model.tensor_model_parallel_size", "4", "--model.sequence_parallel", "true"]
    load_config([path, *layout])[0].check(4)
    config, _ = load_config([path, *layout, "--data.sequence_length", "30"])
    with pytest.raises(
        InputError, match=r"data\.sequence_length \(30\) must be a multiple of .* 4"
    ):
        config.check(4)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(["nowhere.yaml"])
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(InputError, match=r"broken\.yaml"):
        load_config([str(broken)])


def test_the_preset_of_the_paper_is_the_paper(path: str) -> None:
    """And what is resolved from it reads back as the same run."""
    for preset, expected in (
        ("null", ("log", "prior", 0.5)),
        ("paper", ("linear", "uniform", 0.0)),
    ):
        config, resolved = load_config([path, "--remix.preset", preset])
        remix = config.remix
        assert (remix.gain, remix.diversity_reference, remix.smoothing) == expected
        Path(path).with_name("again.yaml").write_text(resolved)
        again, _ = load_config([str(Path(path).with_name("again.yaml"))])
        assert again.remix == remix


def test_the_first_interval_can_have_a_length_of_its_own(path: str) -> None:
    config, _ = load_config([path, "--remix.first_interval_samples", "16"])
    assert list(config.boundaries) == [2, 6, 10]  # then every 32 samples, 4 iterations
    plain, _ = load_config([path])
    assert list(plain.boundaries) == [4, 8]
    for samples, words in (("12", "nearest are 8 and 16"), ("8", "before Adam's second moment")):
        wrong, _ = load_config(
            [path, "--remix.first_interval_samples", samples, "--optimizer.adam_beta2", "0.5"]
        )
        with pytest.raises(InputError, match=rf"remix\.first_interval_samples .*{words}"):
            wrong.check(1)


def test_pipeline_stages_must_divide_the_layers(path: str) -> None:
    config, _ = load_config([path, "--model.pipeline_model_parallel_size", "3"])
    with pytest.raises(InputError, match="num_layers"):
        config.check(3)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in (
        "torchrun --nproc-per-node",
        "--remix.constraints.max_total_variation",
        "Largest change per reset",
        "--model.tensor_model_parallel_size",
    ):
        assert words in text
    assert "moe_router" not in text, "megatron-core's rare fields would drown the rest"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TrainConfig(train_iters=0), "train.train_iters (0) must be above 0"),
        (lambda: TrainConfig(train_iters=2.5), "train.train_iters (2.5) must be a whole number"),
        (lambda: TrainConfig(train_iters=None), "train.train_iters (None) must be a number"),
        (lambda: TrainConfig(train_iters=True), "train.train_iters (True) must be a number"),
        (lambda: TrainConfig(train_iters="8"), "train.train_iters ('8') must be a number"),
        (lambda: TrainConfig(train_iters={"a": 1}), "train.train_iters ({'a': 1}) must be"),
        (lambda: ProbeConfig(precision={"a": 0.5}), "probe.precision ({'a': 0.5}) must be"),
        (lambda: ProbeConfig(damping="0.5"), "probe.damping ('0.5') must be a number"),
        (lambda: ProbeConfig(precision=1.0), "probe.precision (1.0) must be above 0 and below 1"),
        (lambda: RemixConfig(gamma=float("nan")), "remix.gamma (nan) must be at least 0"),
        (
            lambda: ConstraintsConfig(max_epochs={"low": 0.0}),
            "remix.constraints.max_epochs (0.0) must be above 0 and finite",
        ),
    ],
)
def test_sections_built_in_python_are_held_to_the_same_ranges(
    build: Callable[[], object], words: str
) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        build()


def test_numbers_of_a_section_are_plain(path: str) -> None:
    config, _ = load_config([path])
    built = TrainConfig(train_iters=4.0)  # type: ignore[arg-type]
    for number, kind in (
        (config.train.train_iters, int),
        (config.remix.gamma, float),
        (built.train_iters, int),
    ):
        assert type(number) is kind
