"""The names of megatron-core that are not public, or that we set or replace, in this version."""

import dataclasses
import inspect

import pytest
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

METHODS = {
    DistributedOptimizer: {
        "_get_main_param_and_optimizer_states": ["model_param"],
        "_set_main_param_and_optimizer_states": ["model_param", "tensors"],
        "_init_optimizer_states_with_dummy_values": [],
        "get_parameter_state_dp_zero": ["use_gloo_comm", "empty_data", "return_on_all_ranks"],
    },
    DistributedDataParallel: {
        "no_sync": [],
        "start_param_sync": ["force_sync"],
        "finish_grad_sync": ["force_all_reduce"],
        "enable_forward_pre_hook": [],
        "disable_forward_pre_hook": ["param_sync"],
        "zero_grad_buffer": [],
        "scale_gradients": ["scaling_factor"],
    },
}
FIELDS = {
    ModelParallelConfig: [
        "finalize_model_grads_func",
        "grad_scale_func",
        "no_sync_func",
        "grad_sync_func",
        "deallocate_pipeline_outputs",
        "overlap_p2p_comm",
        "batch_p2p_comm",
    ],
    TransformerConfig: ["calculate_per_token_loss", "masked_softmax_fusion"],
    DistributedDataParallelConfig: [
        "check_for_nan_in_grad",
        "check_for_large_grads",
        "average_in_collective",
        "align_param_gather",
    ],
    ProcessGroupCollection: ["tp", "pp", "dp", "cp", "dp_cp", "mp"],
}


@pytest.mark.parametrize(
    ("owner", "name", "arguments"),
    [(o, name, arguments) for o, names in METHODS.items() for name, arguments in names.items()],
)
def test_methods_take_what_we_give_them(owner: type, name: str, arguments: list[str]) -> None:
    parameters = inspect.signature(getattr(owner, name)).parameters
    assert set(arguments) <= set(parameters)


@pytest.mark.parametrize(("owner", "names"), FIELDS.items())
def test_configurations_have_the_fields_that_we_set(owner: type, names: list[str]) -> None:
    assert set(names) <= {field.name for field in dataclasses.fields(owner)}


def test_functions_take_what_we_give_them() -> None:
    for function, arguments in {
        _ParamAndGradBucket.__init__: ["grad_data", "gradient_scaling_factor", "numel_unpadded"],
        finalize_model_grads: ["model", "num_tokens"],
        get_megatron_optimizer: ["use_gloo_process_groups", "pg_collection"],
        GPTModel.__init__: ["pg_collection", "vp_stage"],
        schedules.get_forward_backward_func: ["pp_size", "vp_size"],
    }.items():
        assert set(arguments) <= set(inspect.signature(function).parameters), function


def test_the_schedule_reads_its_hooks_when_it_runs() -> None:
    """Hooks and `calculate_per_token_loss` are put in its configuration for a probe alone."""
    source = inspect.getsource(schedules)
    for hook in ("finalize_model_grads_func", "no_sync_func", "calculate_per_token_loss"):
        assert f"config.{hook}" in source
