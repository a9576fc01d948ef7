"""A pretrain_gpt.py for those who have megatron-core's wheel and no checkout of Megatron-LM.

It takes Megatron's arguments and trains a GPT in NVIDIA's own loop, `megatron.training`
(megatron-core 0.19). Run it as it is, or with a mixture that moves:

    torchrun … -m megatron_tikmix.hosts.megatron_lm pretrain_gpt.py … --tikmix-config tikmix.yaml
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_attr_wrapped_model, get_batch_on_this_tp_rank
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")


def get_batch(data_iterator, vp_stage):
    """Read a micro-batch on the first tensor-parallel rank, and send it to the others."""
    args = get_args()
    if not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(KEYS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        read = next(data_iterator)
        batch = {key: read[key].cuda(non_blocking=True) if key in read else None for key in KEYS}
        batch |= dict.fromkeys(("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size"))
    return get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=1,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )


def loss_func(loss_mask, output):
    """Return summed loss, its number of tokens, and both for the log."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def forward_step(data_iterator, model):
    """Return the model's output on a micro-batch, and the function of its loss."""
    batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    inputs = (batch[key] for key in ("tokens", "position_ids", "attention_mask"))
    return model(*inputs, labels=batch["labels"]), partial(loss_func, batch["loss_mask"])


def datasets(train_valid_test_num_samples, vp_stage=None):
    """Build the datasets of Megatron's data arguments; with --tikmix-config, without any, none."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    reads = mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)
    builder = BlendedMegatronDatasetBuilder(
        kind, train_valid_test_num_samples, lambda: reads, config
    )
    return builder.build()


if __name__ == "__main__":
    datasets.is_distributed = True
    arguments = parse_and_validate_args()
    settings = pretrain_cfg_container_from_args(arguments, gpt_config_from_args(arguments))
    pretrain(settings, datasets, ModelType.encoder_or_decoder, forward_step)
