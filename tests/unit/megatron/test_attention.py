"""torch's attention against megatron-core's own: the same numbers, in less memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_tikmix.config import GPTConfig
from megatron_tikmix.megatron.attention import ScaledDotProductAttention
from megatron_tikmix.megatron.groups import Parallel, initialize, shut_down
from megatron_tikmix.megatron.model import kernels_in_use
from megatron_tikmix.megatron.samples import DocumentBoundaries, stack
from tests.conftest import EOD, overridden
from tests.one_rank import one_rank

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "attention_dropout": 0.0,
}
BATCH = 2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WITHOUT_SCORES = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    yield initialize(GPTConfig(**SHAPE), 1, 5)
    shut_down()


def core(kind: type[DotProductAttention], parallel: Parallel, **fields: Any) -> DotProductAttention:
    """The core attention of layer 2."""
    config = GPTConfig(**{**SHAPE, **fields})
    return kind(
        config=config,
        layer_number=2,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=config.softmax_scale,
        pg_collection=parallel.groups,
    )


def inputs(attention: DotProductAttention, length: int) -> list[torch.Tensor]:
    """Query, key and value."""
    config = attention.config
    generator = torch.Generator().manual_seed(length)
    heads = config.num_attention_heads, config.num_query_groups, config.num_query_groups
    return [
        torch.randn(length, BATCH, number, config.kv_channels, generator=generator)
        .to(DEVICE, config.params_dtype)
        .requires_grad_()
        for number in heads
    ]


def documents(length: int) -> torch.Tensor:
    """The mask of samples in which a document ends after every ninth and eleventh token."""
    tokens = torch.ones(BATCH, length, dtype=torch.int64, device=DEVICE)
    tokens[0, 8::9] = tokens[1, 10::11] = EOD
    batch = DocumentBoundaries(EOD, reset_attention_mask=True).applied({"tokens": tokens})
    return batch["attention_mask"]


def attended(attention: DotProductAttention, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The output, and the gradients of its inputs."""
    given = inputs(attention, 40)
    output = attention(*given, mask)
    weights = torch.linspace(-1, 1, output.numel(), device=DEVICE).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), given)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_query_groups": 2},
        {"num_query_groups": 1, "bf16": True},
        {"bf16": True},
        {"softmax_scale": 0.7, "apply_query_key_layer_scaling": True},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_it_is_megatrons(fields: dict[str, Any], masked: bool, parallel: Parallel) -> None:
    mask = documents(40) if masked else None
    expected = attended(core(DotProductAttention, parallel, **fields), mask)
    with sdpa_kernel(WITHOUT_SCORES):
        found = attended(core(ScaledDotProductAttention, parallel, **fields), mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item()
        assert (ours - theirs).abs().max().item() < scale * (0.03 if "bf16" in fields else 1e-5)


def test_a_mask_matters(parallel: Parallel) -> None:
    attention = core(ScaledDotProductAttention, parallel)
    plain, masked = attended(attention, None)[0], attended(attention, documents(40))[0]
    assert plain[:9, 0].equal(masked[:9, 0])
    assert not torch.allclose(plain[9:, 0], masked[9:, 0], atol=0.1)


def kept(layers: list[DotProductAttention], length: int, masked: bool) -> int:
    """Bytes that autograd keeps of these layers for a backward pass."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    mask = documents(length) if masked else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(*inputs(layer, length), mask) for layer in layers]
    assert len(outputs) == len(layers)
    return sum(storage.nbytes() for storage in storages.values())


def test_memory_is_linear_in_the_sequence(parallel: Parallel) -> None:
    for kind, growth in ((ScaledDotProductAttention, 2.0), (DotProductAttention, 4.0)):
        layer = [core(kind, parallel)]
        assert kept(layer, 2048, False) / kept(layer, 1024, False) == pytest.approx(growth, rel=0.1)


def test_a_mask_is_kept_once_for_all_layers(parallel: Parallel) -> None:
    layers = [core(ScaledDotProductAttention, parallel) for _ in range(3)]
    assert kept(layers, 256, True) - kept(layers, 256, False) == BATCH * 256**2 * 4


def test_dropout_is_that_of_training_and_of_the_ranks_own_random_state(parallel: Parallel) -> None:
    attention = core(ScaledDotProductAttention, parallel, attention_dropout=0.25)
    query, key, _ = inputs(attention, 8)
    ones = torch.ones_like(key)
    states, before = get_cuda_rng_tracker().get_states(), torch.get_rng_state()

    def drawn() -> torch.Tensor:
        get_cuda_rng_tracker().set_states(dict(states))
        output: torch.Tensor = attention(query, key, ones, None)
        return output.detach()

    assert drawn().equal(drawn())
    assert torch.get_rng_state().equal(before)
    draws = torch.stack([attention(query, key, ones, None).detach() for _ in range(1000)])
    assert draws[:, 0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert draws.mean().item() == pytest.approx(1, abs=0.01)
    attention.eval()
    assert torch.allclose(drawn(), ones.flatten(start_dim=2))


def loss_and_gradient(run: Any) -> torch.Tensor:
    """Loss of each token of a micro-batch, and the gradients of all parameters, one vector."""
    (model,) = run.forward_backward.model
    sample = stack([run.streams[0][0], run.streams[1][0]])
    sample["tokens"][:, 10] = EOD
    step = run.forward_backward.forward_step_func
    losses, loss_function = step(iter([sample]), model)
    model.zero_grad_buffer()
    loss_function(losses)[0].backward()
    gradients = [buffer.grad_data.flatten() for buffer in model.buffers]
    return torch.cat([losses.detach().flatten(), *gradients])


@pytest.mark.parametrize("masked", [False, True])
def test_a_model_has_the_same_loss_and_gradients(
    masked: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    shape = {"model.num_query_groups": 2, "data.reset_attention_mask": masked}
    found = []
    for fields in (
        {"model.attention_backend": "local"},
        {"model.attention_backend": "flash"},
        {"model.attention_backend": "fused", "model.recompute_granularity": "selective"},
        {
            "model.attention_backend": "flash",
            "model.recompute_granularity": "full",
            "model.recompute_method": "uniform",
            "model.recompute_num_layers": 1,
        },
    ):
        with one_rank(overridden(settings, shape | fields), tmp_path) as run:
            found.append(loss_and_gradient(run))
            words = kernels_in_use(run.forward_backward.model, run.optimizer)
            assert "megatron-core DotProductAttention" in words or len(found) > 1
            assert "torch ScaledDotProductAttention" in words or len(found) == 1
    expected, *others = found
    for other in others:
        assert torch.allclose(other, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        assert not other.equal(expected), "it is the same attention"


def test_recomputation_draws_the_same_dropout(settings: dict[str, Any], tmp_path: Path) -> None:
    found = []
    for granularity in (None, "selective"):
        fields = {
            "model.attention_backend": "flash",
            "model.attention_dropout": 0.2,
            "model.recompute_granularity": granularity,
        }
        with one_rank(overridden(settings, fields), tmp_path) as run:
            found.append(loss_and_gradient(run))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


def test_it_is_chosen_by_attention_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**fields: Any) -> set[str]:
        return {
            backend.name
            for backend in AttnBackend
            if GPTConfig(**SHAPE, **fields, attention_backend=backend).uses_torch_attention
        }

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen() == {"flash", "fused"}
    assert chosen(transformer_impl="transformer_engine") == set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen(transformer_impl="local") == {"flash", "fused", "auto"}
