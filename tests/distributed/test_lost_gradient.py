"""A gradient that is lost on one rank, even in a copy that no norm counts, is lost on all."""

from typing import Any

import pytest
import torch

from megatron_tikmix.megatron.step import train_step
from tests.conftest import overridden
from tests.ranks import run_on_ranks
from tests.rollout_runs import job, trained

TP = "model.tensor_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "copy of a tensor-parallel rank": (2, {TP: 2}),
    "copy of a tied embedding": (2, {"model.pipeline_model_parallel_size": 2}),
    "data parallel, overlapped, bf16, not clipped": (
        2,
        {
            "ddp.overlap_grad_reduce": True,
            "ddp.overlap_param_gather": True,
            "model.bf16": True,
            "optimizer.clip_grad": 0.0,
        },
    ),
}


def steps(settings: dict[str, Any]) -> dict[str, Any]:
    """A step whose gradient is lost in the last rank's last parameter, and one that is not."""
    with job(settings) as parallel:
        run = trained(settings, parallel, iters=2)
        chunk = run.forward_backward.model[0]
        config = chunk.config
        finalize = config.finalize_model_grads_func

        def losing(*arguments: Any, **options: Any) -> None:
            finalize(*arguments, **options)
            if parallel.rank == parallel.world_size - 1:
                # Of the first stage a tied embedding, of others a norm: both are copies.
                names = ("word_embeddings", "final_layernorm.bias", "layer_norm_bias")
                lost = [
                    parameter
                    for name, parameter in chunk.named_parameters()
                    if any(part in name for part in names)
                ]
                lost[0].main_grad.view(-1)[3] = torch.inf

        def values() -> list[torch.Tensor]:
            parts = run.optimizer.chained_optimizers
            mains = [p for part in parts for g in part.optimizer.param_groups for p in g["params"]]
            return [main.detach().clone() for main in mains]

        def step(said: int) -> Any:
            size = run.config.train.global_batch_size
            count = size // run.config.train.micro_batch_size // parallel.data_parallel_size
            batches = run.loader.interval(run.state.consumed_samples, size)
            return train_step(
                run.forward_backward,
                batches,
                count,
                run.optimizer,
                run.scheduler,
                size,
                lambda: (said, parallel.rank),
            )

        before = values()
        config.finalize_model_grads_func = losing
        lost = step(7)
        kept = all(map(torch.equal, before, values()))
        config.finalize_model_grads_func = finalize
        fine = step(0)
        moved = not all(map(torch.equal, before, values()))
        return {
            "skipped": [lost.skipped, fine.skipped],
            "norms": [lost.grad_norm, fine.grad_norm],
            "said": [lost.said, fine.said],
            "kept": kept,
            "moved": moved,
            "finite": all(torch.isfinite(value).all() for value in values()),
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_skips_the_update_and_goes_on(layout: str, settings: dict[str, Any]) -> None:
    ranks, changes = LAYOUTS[layout]
    for seen in run_on_ranks(steps, ranks, overridden(settings, changes)):
        assert seen["skipped"] == [True, False]
        assert torch.tensor(seen["norms"]).isnan().tolist() == [True, False]
        assert seen["said"] == [[7, 1], [0, 1]]
        assert seen["kept"]
        assert seen["moved"]
        assert seen["finite"]
