"""Influence through the whole path equals plain torch.autograd on the whole model."""

import numpy as np
import torch

from megatron_tikmix.data.samples import Sample
from megatron_tikmix.training.loop import Run
from tests.unit.training.conftest import DAMPING


def whole_gradient(model: torch.nn.Module, batches: list[Sample]) -> torch.Tensor:
    """∇ of the mean loss per unmasked token, by autograd, over all parameters, float64 (P,)."""
    parameters = list(model.parameters())
    loss, tokens = torch.zeros(()), 0.0
    for batch in batches:
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        loss = loss + (losses * batch["loss_mask"]).sum()
        tokens += batch["loss_mask"].sum().item()
    gradients = torch.autograd.grad(loss / tokens, parameters)
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def second_moment(run: Run) -> torch.Tensor:
    """Adam's v̂ over all parameters, read from torch's own optimizer, float64 (P,)."""
    model, optimizer = run.forward_backward.model[0], run.optimizer.chained_optimizers[0]
    moments = []
    for parameter in model.module.parameters():
        group, index = optimizer.model_param_group_index_map[parameter]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][index]]
        beta2 = optimizer.optimizer.param_groups[group]["betas"][1]
        assert int(state["step"]) == run.state.iteration
        moments.append(state["exp_avg_sq"].double() / (1 - beta2**run.state.iteration))
    return torch.cat(moments)


def unpadded(model: torch.nn.Module, vocab_size: int) -> torch.Tensor:
    """True where a parameter is not vocabulary padding, bool (P,)."""
    masks = []
    for name, parameter in model.named_parameters():
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        if name.endswith("word_embeddings.weight"):
            mask[vocab_size:] = False
        masks.append(mask.flatten())
    return torch.cat(masks)


def test_equals_autograd_on_the_whole_model(trained: Run) -> None:
    assert trained.remixer is not None
    probe = trained.remixer.probe
    with probe.open(stage=1):
        probe.add(np.array([8, 3, 8]))
        bank = probe.add(np.array([0, 5, 0]))
        tokens = probe.tokens
    measured_VD = bank.influence_matrix().values_VD

    model, data = trained.forward_backward.model[0].module, probe._data
    model.eval()
    scale_P = torch.ones(1, dtype=torch.float64)
    if trained.config.probe.curvature == "adam":
        root_P = second_moment(trained).sqrt()
        padded_out = unpadded(model, vocab_size=250)
        assert not padded_out.all(), "the vocabulary must be padded for this to test it"
        scale_P = 1 / (root_P + DAMPING * root_P[padded_out].mean())
    tasks_VP = torch.stack(
        [whole_gradient(model, data.of_task(i)) * scale_P for i in range(len(data.tasks))]
    )
    expected_DBV = torch.stack(
        [
            torch.stack(
                [
                    tasks_VP @ whole_gradient(model, batches)
                    for batches in data.of_domain(j, 1, range(8))
                ]
            )
            for j in range(len(data.domains))
        ]
    ).numpy()
    # Every sub-batch has the same tokens here, so S is the mean over them.
    expected_VD = expected_DBV.mean(axis=1).T
    error = np.abs(measured_VD - expected_VD).max(axis=1) / np.abs(expected_VD).max(axis=1)
    assert error.max() < 1e-5
    # What was passed through, padding included: sub-batches of 4 fill two micro-batches of 3.
    assert tokens == 32 * (2 * 12 + 3 * 8 * 6)
    per_sub_batch = bank.sums_DBV / bank.tokens_DB[:, :, None]
    scale_V = np.abs(expected_VD).max(axis=1)
    assert (np.abs(per_sub_batch - expected_DBV) / scale_V).max() < 1e-5


def test_a_probe_leaves_everything_as_it_was(trained: Run) -> None:
    assert trained.remixer is not None
    model = trained.forward_backward.model[0]

    def snapshot() -> list[torch.Tensor]:
        inner = trained.optimizer.chained_optimizers[0].optimizer
        state = [value for entry in inner.state.values() for value in entry.values()]
        return [tensor.clone() for tensor in [*model.parameters(), *state, torch.get_rng_state()]]

    before = snapshot()
    with trained.remixer.probe.open(stage=1) as probe:
        probe.add(np.full(3, 8))
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(), strict=True))
    assert model.training
    assert all(not parameter.main_grad.any() for parameter in model.parameters())
