"""The contract on the installed megatron-core that optimizer_state.py relies on."""

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tikmix.training.loop import Run
from megatron_tikmix.training.optimizer_state import (
    OptimizerShards,
    distributed_optimizers,
    mend_torch_adam,
    unshare_steps,
)


def shards(run: Run) -> OptimizerShards:
    return OptimizerShards(run.forward_backward.model, run.optimizer, run.parallel.groups, 250)


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_one_rank_owns_every_element_once(trained: Run) -> None:
    model = trained.forward_backward.model[0]
    assert shards(trained).numel == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_mean_root_leaves_vocabulary_padding_out(trained: Run) -> None:
    held = shards(trained)
    moment_P = held.second_moment()
    _, count = held.root_sum_and_count(moment_P).tolist()
    assert held.numel - count == (256 - 250) * 32


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_second_moment_before_the_first_step_is_refused(trained: Run) -> None:
    for part in distributed_optimizers(trained.optimizer):
        part.optimizer.state.clear()
    with pytest.raises(RuntimeError, match="before its first step"):
        shards(trained).second_moment()


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_steps_are_each_parameters_own_after_loading(trained: Run) -> None:
    """megatron-core's load shares one step tensor, which would advance once per parameter."""
    (part,) = distributed_optimizers(trained.optimizer)
    mend_torch_adam(trained.optimizer)
    part.load_state_dict(part.state_dict())
    steps = [state["step"] for state in part.optimizer.state.values()]
    assert len({step.data_ptr() for step in steps}) == 1, "mended upstream: drop unshare_steps"
    unshare_steps(trained.optimizer)
    steps = [state["step"] for state in part.optimizer.state.values()]
    assert len({step.data_ptr() for step in steps}) == len(steps) > 1
    assert {int(step) for step in steps} == {trained.state.iteration}


def test_optimizers_without_shards_are_refused_by_name() -> None:
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match="SGD has no sharded second moment"):
        distributed_optimizers(plain)


def test_the_private_names_are_there() -> None:
    for name in (
        "_get_main_param_and_optimizer_states",
        "_set_main_param_and_optimizer_states",
        "_init_optimizer_states_with_dummy_values",
    ):
        assert callable(getattr(DistributedOptimizer, name)), name
