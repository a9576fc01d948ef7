"""A training loop of megatron-core alone, on its own BlendedDataset: nothing of megatron_tikmix.

As Megatron's pretrain_gpt.py puts it together: local layer spec, GPTModel, DistributedDataParallel,
distributed optimizer, scheduler, schedule, and a DataLoader over a static mixture.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler


class Tokenizer:
    """As far as GPTDataset asks."""

    unique_identifiers = {"class": "none"}  # noqa: RUF012

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab_size, eod


def blended(
    prefixes: dict[str, Path], tokenizer: Tokenizer, sequence_length: int, samples: int, seed: int
) -> BlendedDataset:
    """So many samples of a uniform mixture."""
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    wanted = int(samples / len(prefixes) * 1.005) + 2
    datasets = []
    for prefix in prefixes.values():
        tokens = IndexedDataset(str(prefix), multimodal=False, mmap=True)
        documents = np.arange(len(tokens.document_indices) - 1, dtype=np.int32)
        datasets.append(GPTDataset(tokens, None, documents, wanted, Split.train, config))
    return BlendedDataset(datasets, [1 / len(prefixes)] * len(prefixes), samples, config)


def forward_step(data: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    device = next(model.parameters()).device
    batch = {name: value.to(device, non_blocking=True) for name, value in next(data).items()}
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_function, batch["loss_mask"])


def loss_function(mask: torch.Tensor, output: torch.Tensor) -> Any:
    losses, mask = output.view(-1).float(), mask.view(-1).float()
    total, tokens = (losses * mask).sum(), mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens])}


class PlainLoop:
    """One rank of training, of the sizes of a run's configuration, which it takes over.

    Args:
        layer: in place of megatron-core's local layer.
    """

    def __init__(
        self,
        config: Any,
        dataset: BlendedDataset,
        groups: Any,
        vocab_size: int,
        layer: ModuleSpec | None = None,
    ) -> None:
        model_config, train = config.model, config.train
        model: torch.nn.Module = GPTModel(
            model_config,
            layer or get_gpt_layer_local_spec(normalization=model_config.normalization),
            vocab_size=vocab_size,
            max_sequence_length=config.data.sequence_length,
            share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
            position_embedding_type=model_config.position_embedding_type,
            rotary_percent=model_config.rotary_percent,
            rotary_base=model_config.rotary_base,
            pg_collection=groups,
        )
        if torch.cuda.is_available():
            model = model.cuda()
        if model_config.bf16:
            model = Float16Module(model_config, model)
        self.model = DistributedDataParallel(model_config, config.ddp, model, pg_collection=groups)
        self.optimizer = get_megatron_optimizer(
            config.optimizer,
            [self.model],
            use_gloo_process_groups=False,
            pg_collection=groups,
        )
        model_config.finalize_model_grads_func = finalize_model_grads
        model_config.grad_scale_func = self.optimizer.scale_loss
        self.batch, self.micro = train.global_batch_size, train.micro_batch_size
        self.length = config.data.sequence_length
        steps = train.train_iters * self.batch
        weight_decay = config.optimizer.weight_decay
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.optimizer.lr,
            min_lr=config.optimizer.min_lr,
            lr_warmup_steps=0,
            lr_decay_steps=steps,
            lr_decay_style="constant",
            start_wd=weight_decay,
            end_wd=weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
        )
        sampler = BatchSampler(SequentialSampler(dataset), self.micro, drop_last=True)
        on_gpu = torch.cuda.is_available()
        workers = config.data.num_workers or 0
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=on_gpu)
        self.batches = iter(loader)
        self.schedule = get_forward_backward_func()
        self.losses: list[float] = []

    def train(self, steps: int) -> None:
        loss_and_tokens = torch.zeros(2, device=next(self.model.parameters()).device)
        for _ in range(steps):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            rows = self.schedule(
                forward_step_func=forward_step,
                data_iterator=self.batches,
                model=self.model,
                num_microbatches=self.batch // self.micro,
                seq_length=self.length,
                micro_batch_size=self.micro,
                forward_only=False,
            )
            updated, _, _ = self.optimizer.step()
            if updated:
                self.scheduler.step(increment=self.batch)
            loss_and_tokens += sum(row["lm loss"] for row in rows)
        self.losses.append((loss_and_tokens[0] / loss_and_tokens[1]).item())
