"""Run by torchrun: a few steps, a checkpoint, and a probe in every mode, written down.

torchrun --nproc-per-node N tests/distributed/probe_worker.py CONFIG.yaml OUT.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tikmix.config import ParametersConfig, load_config
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.megatron.step import gathered_parameters
from megatron_tikmix.training.build import build
from megatron_tikmix.training.loop import Run, train_interval
from megatron_tikmix.training.record import Recorder
from tests.influence_reference import make_ragged, probe_of

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


def main(config_file: str, out: str) -> None:
    config, resolved = load_config([config_file])
    parallel = initialize(config.model, config.seed, 5)
    try:
        run = build(config, TrainingData(config), Recorder(config, resolved, parallel), parallel)
        train_interval(run, until=4)
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
        if parallel.is_main:
            Path(out).write_text(json.dumps(banks))
        train_interval(run, until=6)  # training goes on
    finally:
        shut_down()


if __name__ == "__main__":
    main(*sys.argv[1:])
