"""Influence by plain torch.autograd on the whole model, and data with ragged loss masks."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megatron_tikmix.data.tasks import Task
from megatron_tikmix.measure.probe import InfluenceProbe, ProbeData
from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.samples import Sample, stack
from megatron_tikmix.megatron.step import ForwardBackward, forward_step
from megatron_tikmix.training.loop import Run

DAMPING = 0.1
VOCAB_SIZE = 250


class Ragged:
    """A stream whose samples count from a place on that is different for each of them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.samples_per_epoch = stream.samples_per_epoch
        self.padding = stream.padding

    def __getitem__(self, k: int) -> Sample:
        sample = self._stream[k]
        sample["loss_mask"][: (7 * k + 3) % 29] = 0.0
        return sample


def make_ragged(data: ProbeData) -> None:
    """Have every sample of a probe masked up to a place of its own, as completions are."""
    whole = data._open_stream
    data._open_stream = lambda domain, stage: Ragged(whole(domain, stage))
    data.tasks = [Task(task.name, Ragged(task.decide), task.report) for task in data.tasks]


def whole_gradient(run: Run, samples: list[Sample]) -> tuple[torch.Tensor, float]:
    """∇ of the loss summed over unmasked tokens, by autograd, float64 (P,), and the tokens."""
    model = run.forward_backward.model[0].module
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in stack(samples).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    loss = (losses * batch["loss_mask"]).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    flat = torch.cat([gradient.flatten().double() for gradient in gradients]).cpu()
    return flat, batch["loss_mask"].sum().item()


def second_moment(run: Run) -> torch.Tensor:
    """Adam's v̂ over all parameters, read from torch's own optimizer, float64 (P,)."""
    model, optimizer = run.forward_backward.model[0], run.optimizer.chained_optimizers[0]
    moments = []
    for parameter in model.module.parameters():
        number, index = optimizer.model_param_group_index_map[parameter]
        group = optimizer.optimizer.param_groups[number]
        state = optimizer.optimizer.state[group["params"][index]]
        # torch keeps the step with each parameter, Apex and Transformer Engine with the group.
        assert int(state.get("step", group.get("step"))) == run.state.iteration
        moment = state["exp_avg_sq"].double().cpu()
        moments.append(moment / (1 - group["betas"][1] ** run.state.iteration))
    return torch.cat(moments)


def mask_of(run: Run, counts: Callable[[str, torch.Tensor], Any]) -> torch.Tensor:
    """bool (P,): `counts(name, mask)` sets, in the all-true mask of a parameter, what is false."""
    masks = []
    for name, parameter in run.forward_backward.model[0].module.named_parameters():
        mask = torch.ones(parameter.shape, dtype=torch.bool)
        counts(name, mask)
        masks.append(mask.flatten())
    return torch.cat(masks)


def reference(
    run: Run,
    *,
    curvature: str,
    stage: int,
    sub_batch_samples: int,
    task_samples: int,
    selects: Callable[[str], bool] = lambda name: True,
    sub_batches: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """What a bank must hold: sums (D, B, V) and tokens (D, B), of the run's probe data."""
    assert run.remixer is not None
    data = run.remixer.probe._data
    run.forward_backward.model[0].module.eval()
    selected_P = mask_of(run, lambda name, mask: mask.fill_(selects(name)))
    unpadded_P = mask_of(
        run,
        lambda name, mask: (
            name.endswith(("word_embeddings.weight", "output_layer.weight"))
            and mask[VOCAB_SIZE:].fill_(False)
        ),
    )
    assert not unpadded_P.all(), "the vocabulary must be padded for this to test it"

    def sub_batch(domain: int, b: int) -> tuple[torch.Tensor, float]:
        stream, n = data._open_stream(domain, stage), sub_batch_samples
        return whole_gradient(run, [stream[k] for k in range(b * n, (b + 1) * n)])

    domains, first = range(len(data.domains)), 0
    if curvature == "identity":
        scale_P = torch.ones(1, dtype=torch.float64)
    else:
        if curvature == "adam":
            moment_P = second_moment(run)
        else:
            first = 1
            means = [
                gradient_P / tokens for gradient_P, tokens in (sub_batch(j, 0) for j in domains)
            ]
            moment_P = torch.stack(means).square().mean(dim=0)
        root_P = moment_P.sqrt()
        scale_P = 1 / (root_P + DAMPING * root_P[unpadded_P & selected_P].mean())
    tasks = []
    for task in data.tasks:
        count = min(task_samples, task.decide.samples_per_epoch)
        gradient_P, tokens = whole_gradient(run, [task.decide[k] for k in range(count)])
        tasks.append(gradient_P / tokens * scale_P * selected_P)
    tasks_VP = torch.stack(tasks)
    sums_DBV = np.zeros((len(domains), sub_batches, len(tasks)))
    tokens_DB = np.zeros((len(domains), sub_batches))
    for j in domains:
        for b in range(sub_batches):
            gradient_P, tokens_DB[j, b] = sub_batch(j, first + b)
            sums_DBV[j, b] = (tasks_VP @ gradient_P).numpy()
    return sums_DBV, tokens_DB


def largest_error(
    sums_DBV: np.ndarray, tokens_DB: np.ndarray, expected: tuple[np.ndarray, np.ndarray]
) -> float:
    """Of the matrix and of every sub-batch, relative to the largest entry of the matrix's row."""
    expected_sums_DBV, expected_tokens_DB = expected
    np.testing.assert_array_equal(tokens_DB, expected_tokens_DB)
    expected_DV = expected_sums_DBV.sum(axis=1) / tokens_DB.sum(axis=1)[:, None]
    scale_V = np.abs(expected_DV).max(axis=0)
    matrix_DV = sums_DBV.sum(axis=1) / tokens_DB.sum(axis=1)[:, None]
    by_sub_batch_DBV = (sums_DBV - expected_sums_DBV) / tokens_DB[:, :, None]
    return float(
        max(
            (np.abs(matrix_DV - expected_DV) / scale_V).max(),
            (np.abs(by_sub_batch_DBV) / scale_V).max(),
        )
    )


def probe_of(
    run: Run,
    *,
    micro_batch_size: int | None = None,
    forward_step_func: Callable[..., Any] = forward_step,
    **fields: Any,
) -> InfluenceProbe:
    """A probe of the run, with other fields of its configuration."""
    assert run.remixer is not None
    model, parallel = run.forward_backward.model, run.parallel
    size = micro_batch_size or run.config.train.micro_batch_size
    data = copy.copy(run.remixer.probe._data)
    data._micro_batch_size = size
    config = dataclasses.replace(run.config.probe, **fields)
    return InfluenceProbe(
        ForwardBackward(model, parallel, size, run.config.data.sequence_length, forward_step_func),
        run.optimizer,
        OptimizerShards(
            model, run.optimizer, parallel.groups, VOCAB_SIZE, config.parameters.selects
        ),
        data,
        config,
    )
