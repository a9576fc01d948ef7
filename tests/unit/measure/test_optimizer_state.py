"""What is read of megatron-core's distributed optimizer, on one rank."""

import pytest
import torch

from megatron_tikmix.measure.shards import OptimizerShards
from megatron_tikmix.megatron.optimizer import distributed_optimizers
from megatron_tikmix.training.loop import Run


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


def test_optimizers_without_shards_are_refused_by_name() -> None:
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(TypeError, match="SGD has no sharded second moment"):
        distributed_optimizers(plain)
