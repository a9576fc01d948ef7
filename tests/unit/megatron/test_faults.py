"""The faults that megatron/faults.py works around are there, and are worked around."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tikmix.megatron.faults import mend_buckets, mend_torch_adam, unshare_steps
from megatron_tikmix.megatron.optimizer import distributed_optimizers
from megatron_tikmix.training.loop import train_interval
from tests.conftest import overridden
from tests.one_rank import one_rank


def part_of(run: Any) -> DistributedOptimizer:
    (part,) = distributed_optimizers(run.optimizer)
    return part


def test_a_fresh_torch_adam_has_a_state_to_load_into(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """megatron-core asserts that there is a state, which torch's Adam makes in its first step."""
    with one_rank(settings, tmp_path) as run:
        part = part_of(run)
        with pytest.raises(AssertionError):
            part.state_dict()
        mend_torch_adam(run.optimizer)
        part.load_state_dict(part.state_dict())


def test_steps_are_each_parameters_own_after_loading(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """megatron-core's load shares one step tensor, which would advance once per parameter."""
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=2)
        part = part_of(run)
        mend_torch_adam(run.optimizer)
        part.load_state_dict(part.state_dict())
        steps = [state["step"] for state in part.optimizer.state.values()]
        assert len({step.data_ptr() for step in steps}) == 1, "mended upstream: drop unshare_steps"
        unshare_steps(run.optimizer)
        steps = [state["step"] for state in part.optimizer.state.values()]
        assert len({step.data_ptr() for step in steps}) == len(steps) > 1
        assert {int(step) for step in steps} == {run.state.iteration}


def test_the_step_that_a_checkpoint_leaves_out_stays(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with one_rank(settings, tmp_path) as run:
        train_interval(run, until=2)
        part = part_of(run)
        parameter = next(iter(part.model_param_group_index_map))
        held = part._get_main_param_and_optimizer_states(parameter)
        loaded = {name: value.clone() for name, value in held.items() if name != "step"}
        with torch.no_grad(), pytest.raises(KeyError, match="step"):
            part._set_main_param_and_optimizer_states(parameter, loaded)
        mend_torch_adam(run.optimizer)
        # That of Megatron's default format has the step of a new optimizer, and no `no_grad`.
        for saved in (loaded, {**loaded, "step": torch.tensor(1.0)}):
            part._set_main_param_and_optimizer_states(parameter, saved)
            assert int(part._get_main_param_and_optimizer_states(parameter)["step"]) == 2


def test_state_of_several_buckets_is_saved_in_its_places(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    buckets = {"ddp.overlap_grad_reduce": True, "ddp.bucket_size": 4000}
    with one_rank(overridden(settings, buckets), tmp_path) as run:
        # Unmended: its checkpointer has mended it already.
        part = part_of(run)
        vars(part).pop("get_parameter_state_dp_zero")
        train_interval(run, until=2)
        assert len(part.buffers[0].buckets) > 2
        assert not all(in_place(part)), "mended upstream: drop mend_buckets"
        mend_buckets(run.optimizer)
        assert all(in_place(part))


def in_place(part: DistributedOptimizer) -> list[bool]:
    """Of each parameter: whether its main values are where a checkpoint looks for them."""
    (buffer,) = part.buffers
    (saved,) = part.get_parameter_state_dp_zero(use_gloo_comm=False)[0].values()
    found = []
    for parameter, (start, end, _) in buffer.param_index_map.items():
        main = part._get_main_param_and_optimizer_states(parameter)["param"]
        place = saved["param"][start:end]
        found.append(torch.equal(place, main.detach().cpu()[: len(place)]))
    return found


@pytest.mark.parametrize("mended", [False, True])
def test_results_of_a_save_in_the_background_outlive_sigterm(mended: bool) -> None:
    """In a process of its own, as its resource tracker may already run here."""
    program = """if True:
        import multiprocessing, os, signal, sys
        from contextlib import nullcontext
        from megatron_tikmix.megatron.faults import results_past_sigterm

        if __name__ == "__main__":
            with results_past_sigterm() if sys.argv[1] == "True" else nullcontext():
                manager = multiprocessing.get_context("spawn").Manager()
            results = manager.Queue()
            os.kill(manager._process.pid, signal.SIGTERM)
            manager._process.join(1.0)
            results.put("written")
            assert results.get() == "written"
    """
    command = [sys.executable, "-c", program, str(mended)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode == 0) == mended, result.stderr
