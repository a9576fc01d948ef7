"""The line that says which implementations are in use."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine

from megatron_tikmix.config import GPTConfig
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron import model as kernels
from megatron_tikmix.megatron.model import kernels_in_use, layer_spec
from megatron_tikmix.training.loop import Run


def fake(module: str, name: str, base: type = torch.nn.Module) -> Any:
    """An object of a package that is not installed."""
    return type(name, (base,), {"__module__": module})()


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_without_either_all_is_torch_and_megatron(trained: Run) -> None:
    assert kernels_in_use(trained.forward_backward.model, trained.optimizer) == (
        "optimizer torch AdamW; norm torch LayerNorm; attention megatron-core DotProductAttention"
    )


def test_apex_and_transformer_engine_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = "megatron.core.extensions.transformer_engine"
    layer = torch.nn.Module()
    layer.core_attention = fake(extension, "TEDotProductAttention")
    norms = [
        fake("megatron.core.fusions.fused_layer_norm", "FusedLayerNorm"),
        fake(extension, "TELayerNormColumnParallelLinear"),
    ]
    model = torch.nn.ModuleList([*norms, layer])
    adam = SimpleNamespace(optimizer=fake("apex.optimizers.fused_adam", "FusedAdam", object))
    monkeypatch.setattr(kernels, "distributed_optimizers", lambda optimizer: [adam])
    assert kernels_in_use([model], None) == (
        "optimizer Apex FusedAdam; norm Apex FusedLayerNorm, Transformer Engine "
        "TELayerNormColumnParallelLinear; attention Transformer Engine TEDotProductAttention"
    )


def test_a_rank_without_layers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "distributed_optimizers", lambda optimizer: [])
    words = kernels_in_use([torch.nn.Linear(1, 1)], None)
    assert words.count("none on this rank") == 3


SHAPE = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}


def test_transformer_engine_is_used_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = GPTConfig(**SHAPE, transformer_impl="transformer_engine")
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    assert asked.uses_transformer_engine
    assert not GPTConfig(**SHAPE, transformer_impl="local").uses_transformer_engine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert GPTConfig(**SHAPE).uses_transformer_engine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not GPTConfig(**SHAPE).uses_transformer_engine, "it needs a GPU"


def test_transformer_engine_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    with pytest.raises(InputError, match="Transformer Engine cannot be imported here; install it"):
        layer_spec(GPTConfig(**SHAPE, transformer_impl="transformer_engine"))
