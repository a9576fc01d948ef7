"""The planned memory against what a built run holds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tikmix.megatron.samples import stack
from megatron_tikmix.training.loop import train_interval
from megatron_tikmix.training.plan import in_short, plan_memory
from tests.conftest import VOCAB_SIZE, overridden
from tests.one_rank import one_rank

SHAPE = {
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 160,
    "model.num_query_groups": 2,
    "model.gated_linear_unit": True,
    "model.activation_func": "torch.nn.functional.silu",
    "model.normalization": "RMSNorm",
    "model.add_bias_linear": False,
    "remix.policy": "static",
}


@pytest.mark.parametrize("bf16", [False, True])
def test_the_plan_is_what_a_run_holds(bf16: bool, settings: dict[str, Any], tmp_path: Path) -> None:
    with one_rank(overridden(settings, {**SHAPE, "model.bf16": bf16}), tmp_path) as run:
        planned = plan_memory(run.config, 1, VOCAB_SIZE, kept_gradients=0)
        train_interval(run, until=1)
        model = run.forward_backward.model
        parameters = [p for chunk in model for p in chunk.parameters()]
        assert planned.parameters == planned.rank_parameters
        assert planned.parameters == pytest.approx(sum(p.numel() for p in parameters), rel=0.01)
        assert planned.weights == pytest.approx(sum(p.nbytes for p in parameters), rel=0.01)
        gradients = sum(b.grad_data.nbytes for chunk in model for b in chunk.buffers)
        assert planned.gradients == pytest.approx(gradients, rel=0.02)
        held = []
        for part in run.optimizer.chained_optimizers:
            inner = part.optimizer
            held += [v for state in inner.state.values() for v in state.values()]
            if bf16:
                held += [p for group in inner.param_groups for p in group["params"]]
        assert planned.optimizer == pytest.approx(sum(v.nbytes for v in held), rel=0.02)
        if not bf16:  # where nothing is fused, bf16 norms and softmax keep float32 copies
            assert planned.activations == pytest.approx(activations(run), rel=0.25)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["local", "flash"])
def test_the_plan_knows_what_attention_keeps(
    backend: str, masked: bool, settings: dict[str, Any], tmp_path: Path
) -> None:
    long = {
        "data.sequence_length": 512,
        "data.reset_attention_mask": masked,
        "model.attention_backend": backend,
    }
    with one_rank(overridden(settings, {**SHAPE, **long}), tmp_path) as run:
        planned = plan_memory(run.config, 1, VOCAB_SIZE, kept_gradients=0).activations
        assert planned == pytest.approx(activations(run), rel=0.15)


def activations(run: Any) -> int:
    """Bytes that autograd keeps of one micro-batch's forward pass, parameters apart."""
    (model,) = run.forward_backward.model
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    batch = stack([run.streams[0][k] for k in range(run.config.train.micro_batch_size)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, loss_func = run.forward_backward.forward_step_func(iter([batch]), model)
        loss_func(output)
    return sum(storage.nbytes() for storage in kept.values())


def test_numbers_are_told_in_short() -> None:
    assert [in_short(n) for n in (999, 1_000, 974_000_000, 6_738_000_000)] == [
        "999",
        "1 k",
        "974 M",
        "6.74 B",
    ]
