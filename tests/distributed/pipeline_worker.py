"""Run by torchrun, two ranks: an interleaved pipeline as megatron-core would have it, and as we do.

torchrun --nproc-per-node 2 tests/distributed/pipeline_worker.py CONFIG.yaml OUT.json
"""

import json
import sys
from pathlib import Path

import torch

from megatron_tikmix.config import load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.data.domain_stream import DomainStream
from megatron_tikmix.data.samples import Sample, stack
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.training.build import build_training

VARIANTS = {
    "ours": {},
    "not overlapped": {"overlap_p2p_comm": False, "batch_p2p_comm": True},
    "ours again": {},
}


def micro_batches(streams: list[DomainStream]) -> list[Sample]:
    """Eight of two samples."""
    return [stack([streams[0][n], streams[1][n]]) for n in range(8)]


def main(config_file: str, out: str) -> None:
    config, _ = load_config([config_file])
    parallel = initialize(config.model, config.seed, 5)
    try:
        data = TrainingData(config)
        forward_backward, _, _ = build_training(config, data, parallel)
        batches = micro_batches(data.streams)
        found = {}
        model_config = forward_backward.model[0].config
        for name, fields in VARIANTS.items():
            former = {field: getattr(model_config, field) for field in fields}
            vars(model_config).update(fields)
            for chunk in forward_backward.model:
                chunk.zero_grad_buffer()
            sums = forward_backward(batches, len(batches))
            vars(model_config).update(former)
            found[name] = [rows["loss"].sum().item() for rows in sums]
        if parallel.rank == parallel.world_size - 1:
            Path(out).write_text(json.dumps(found))
        torch.distributed.barrier()
    finally:
        shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
