"""The probe gives what autograd gives on the assembled model, on every layout, in both modes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tikmix.config import ParametersConfig
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.megatron.step import gathered_parameters
from megatron_tikmix.training.loop import Run, train_interval
from tests.conftest import overridden
from tests.influence_reference import largest_error, make_ragged, probe_of, reference
from tests.one_rank import one_rank
from tests.ranks import run_on_ranks
from tests.rollout_runs import job, trained

OVERLAP = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2x2x2": (
        8,
        {"model.tensor_model_parallel_size": 2, "model.pipeline_model_parallel_size": 2},
    ),
    "tensor 2, sequence parallel": (
        2,
        {"model.tensor_model_parallel_size": 2, "model.sequence_parallel": True},
    ),
    "data parallel 2, overlapped": (2, {**OVERLAP, "ddp.bucket_size": 4000}),
    "interleaved pipeline 2 x data 2": (
        4,
        {
            **OVERLAP,
            "model.pipeline_model_parallel_size": 2,
            "model.virtual_pipeline_model_parallel_size": 2,
        },
    ),
}


SELECTION = ParametersConfig(exclude=["embedding.*", "decoder.layers.2.*"])
VARIANTS: dict[str, dict[str, Any]] = {
    f"{curvature} {mode}": {"curvature": curvature, "data_parallel_mode": mode}
    for curvature in ("identity", "adam", "squared_gradients")
    for mode in ("sharded", "replicated")
} | {
    "adam replicated in groups": {"data_parallel_mode": "replicated", "task_group_size": 1},
    "adam replicated filtered": {"data_parallel_mode": "replicated", "parameters": SELECTION},
}


def snapshot(run: Run) -> list[torch.Tensor]:
    """Parameters, optimizer state and random state of this rank."""
    state = [torch.get_rng_state()]
    with gathered_parameters(run.forward_backward.model):  # parameters may not be gathered yet
        for chunk in run.forward_backward.model:
            state += [parameter.detach().clone() for parameter in chunk.parameters()]
    for part in run.optimizer.chained_optimizers:
        for entry in part.optimizer.state.values():
            state += [value for value in entry.values() if isinstance(value, torch.Tensor)]
    return [tensor.detach().clone() for tensor in state]


def probes(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What every variant of the probe measures on this layout, in a checkpoint that is saved."""
    with job(settings) as parallel:
        run = trained(settings, parallel, iters=4)
        run.checkpointer.save(run.state)
        assert run.remixer is not None
        make_ragged(run.remixer.probe._data)
        before, banks = snapshot(run), {}
        for name, fields in VARIANTS.items():
            probe = probe_of(run, **fields)
            with probe.open(1):
                probe.add(np.array([8, 3, 5]))
                bank = probe.add(np.array([0, 5, 3]))
            banks[name] = {"tokens_passed": probe.tokens, **bank.to_json()}
            assert all(
                not parameter.main_grad.any()
                for chunk in run.forward_backward.model
                for parameter in chunk.parameters()
            )
        assert all(torch.equal(a, b) for a, b in zip(before, snapshot(run), strict=True))
        train_interval(run, until=6)  # training goes on
        return banks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_mode_gives_what_autograd_gives(
    layout: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ranks, fields = LAYOUTS[layout]
    settings = overridden(
        settings,
        # Micro-batches of 1: with 4 samples a sub-batch, no layout here needs padding.
        {"train.micro_batch_size": 1, "checkpoint.keep": 1, "probe.damping": 0.1},
    )
    banks, *_ = run_on_ranks(probes, ranks, overridden(settings, fields), timeout=500)
    expected = {}
    with one_rank(settings, tmp_path) as run:  # the checkpoint, on one rank
        assert run.state.iteration == 4
        assert run.remixer is not None
        make_ragged(run.remixer.probe._data)
        for name in VARIANTS:
            curvature, filtered = name.split()[0], name.endswith("filtered")
            key = curvature, filtered
            if key not in expected:
                expected[key] = reference(
                    run,
                    curvature=curvature,
                    stage=1,
                    sub_batch_samples=4,
                    task_samples=12,
                    **({"selects": SELECTION.selects} if filtered else {}),
                )
            bank = SubBatchBank.from_json(banks[name])
            error = largest_error(bank.sums_DBV, bank.tokens_DB, expected[key])
            print(f"{layout}, {name}: {error:.1e}")
            assert error < 1e-5, name
    of_tasks, of_domains = 2 * 12 * 32, 3 * 8 * 4 * 32
    assert banks["adam sharded"]["tokens_passed"] == of_tasks + of_domains
    assert banks["adam replicated"]["tokens_passed"] == of_tasks + of_domains
    assert banks["adam replicated in groups"]["tokens_passed"] == of_tasks + 2 * of_domains
    assert banks["squared_gradients sharded"]["tokens_passed"] == of_tasks + of_domains * 9 // 8
