"""A training loop of megatron-core alone, with its defaults, that hosts a Remixer.

torchrun --nproc-per-node 2 tests/distributed/bare_loop.py SETTINGS.json OUT.json
"""

import json
import sys
from functools import partial
from pathlib import Path

from megatron_tikmix.config import DataConfig, ProbeConfig, RemixConfig, TaskConfig, TrainConfig
from megatron_tikmix.config.sections import HostedConfig
from megatron_tikmix.data.dataset import BlendedDataset, DataParallelLoader
from megatron_tikmix.decision.decide import Boundary
from megatron_tikmix.decision.ledger import Ledger, StageRow
from megatron_tikmix.hosts.megatron_core import build_remixer, open_data
from megatron_tikmix.megatron.groups import Parallel

# isort: split
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

SAMPLES, LENGTH, MICRO, BATCH, INTERVAL = 96, 32, 2, 8, 32


def loss_func(loss_mask, output):
    """As that of Megatron-LM's pretrain_gpt.py."""
    loss, tokens = (output.float() * loss_mask).sum(), loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def main(settings, out):
    # What any such loop does: groups, model, optimizer, the schedule's hooks.
    dist.init_process_group("gloo")
    pp = settings["pipeline_model_parallel_size"]
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    shape = {"calculate_per_token_loss": settings["calculate_per_token_loss"]}
    config = TransformerConfig(
        **settings["transformer"], pipeline_model_parallel_size=pp, pipeline_dtype=torch.float,
        deallocate_pipeline_outputs=False, **shape,
    )  # fmt: skip
    stage = {
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
    }
    gpt = GPTModel(
        config, get_gpt_layer_local_spec(), 256, LENGTH, position_embedding_type="rope",
        share_embeddings_and_output_weights=True, **stage,
    )  # fmt: skip
    gpt.load_state_dict(
        torch.load(f"{settings['parameters']}.{parallel_state.get_pipeline_model_parallel_rank()}")
    )
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True, **settings["ddp"])
    model = [DistributedDataParallel(config, ddp, gpt)]
    adam = OptimizerConfig(use_distributed_optimizer=True, **settings["optimizer"])
    optimizer = get_megatron_optimizer(adam, model)
    scheduler = OptimizerParamScheduler(
        optimizer, 0.0, adam.lr, 0.0, 0, SAMPLES, "cosine", adam.weight_decay, adam.weight_decay,
        SAMPLES, "constant", use_checkpoint_opt_param_scheduler=False,
    )  # fmt: skip
    config.finalize_model_grads_func, config.grad_scale_func = (
        finalize_model_grads,
        optimizer.scale_loss,
    )
    # And what is ours: data that follows a schedule of mixtures, and what decides them.
    parallel = Parallel.from_megatron()
    hosted = HostedConfig(
        data=DataConfig(
            manifest=settings["manifest"], sequence_length=LENGTH, initial_mixture="uniform"
        ),
        tasks={name: TaskConfig(domain=name) for name in ("high", "low")},
        train=TrainConfig(
            train_iters=SAMPLES // BATCH, micro_batch_size=MICRO, global_batch_size=BATCH
        ),
        remix=RemixConfig(interval_samples=INTERVAL, influence="marginal"),
        probe=ProbeConfig(sub_batch_samples=4, task_samples=12, max_overhead=None),
        run_dir=settings["run_dir"],
    )
    data = open_data(hosted, parallel)
    remixer = build_remixer(hosted, data, model, optimizer, scheduler, forward_step, parallel)
    schedule, losses = data.initial_schedule(), []
    # Written by one rank; the others count stages by theirs.
    ledger = Ledger(run_dir=hosted.run_dir if parallel.is_main else None)
    ledger.append(StageRow.first(schedule.mixture(0)))
    dp_rank, dp_size = (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )
    loader = DataParallelLoader(
        BlendedDataset(schedule, data.streams, parallel), micro_batch_size=MICRO, num_workers=0,
        data_parallel_rank=dp_rank, data_parallel_size=dp_size,
    )  # fmt: skip
    for consumed in range(0, SAMPLES, BATCH):
        if consumed % INTERVAL == 0:
            if consumed:
                at = Boundary.of(
                    schedule, ledger, iteration=consumed // BATCH, consumed_samples=consumed,
                    interval_samples=INTERVAL,
                )  # fmt: skip
                decision = remixer.remix(at)
                schedule.append(consumed, decision.mixture)
                ledger.append(decision.row(at))
            batches = loader.interval(consumed, INTERVAL)
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        reduced = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=batches, model=model[0],
            num_microbatches=BATCH // MICRO // dp_size, seq_length=LENGTH, micro_batch_size=MICRO,
            forward_only=False,
        )  # fmt: skip
        optimizer.step()
        scheduler.step(increment=BATCH)
        losses.append(sum(row["lm loss"] for row in reduced).tolist() if reduced else None)
    if dist.get_rank() == dist.get_world_size() - 1:
        Path(f"{out}.losses").write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), sys.argv[2])
