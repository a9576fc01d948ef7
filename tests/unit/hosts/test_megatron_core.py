"""What a loop that is not ours is told when a Remixer cannot work in it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.rerun_state_machine import (
    RerunMode,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)

from megatron_tikmix.config.sections import HostedConfig
from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.hosts.megatron_core import build_remixer, open_data
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.step import forward_step
from tests.one_rank import one_rank


def test_process_groups_come_first() -> None:
    with pytest.raises(InputError, match="megatron-core has no process groups yet"):
        Parallel.from_megatron()


@pytest.fixture
def host(settings: dict[str, Any], tmp_path: Path) -> Any:
    """Builds a Remixer from what a run of ours has in hand, with something changed."""
    with one_rank(settings, tmp_path) as run:
        ours = run.config
        config = HostedConfig(
            data=ours.data,
            tasks=ours.tasks,
            train=ours.train,
            remix=ours.remix,
            probe=ours.probe,
            run_dir=ours.run_dir,
        )

        def build(
            model: Any = None, step: Callable[..., Any] = forward_step, **sections: Any
        ) -> Remixer:
            changed = replace(config, **sections)
            parallel = run.parallel
            data = open_data(changed, parallel)
            model = model or run.forward_backward.model
            return build_remixer(changed, data, model, run.optimizer, run.scheduler, step, parallel)

        build.run, build.config = run, config  # type: ignore[attr-defined]
        yield build


def test_what_is_missing_or_wrong_is_named(host: Any) -> None:
    remix, train = host.config.remix, host.config.train
    bare = [chunk.module for chunk in host.run.forward_backward.model]
    for changed, words in (
        ({"model": bare}, "chunks must be megatron-core DistributedDataParallel, not GPTModel"),
        ({"remix": replace(remix, policy="static")}, "remix: nothing is decided"),
        ({"train": replace(train, micro_batch_size=3)}, r"train.global_batch_size \(8\) must be"),
        ({"remix": replace(remix, interval_samples=30)}, "the nearest are 24 and 32"),
        ({"remix": replace(remix, interval_samples=8)}, "second moment has settled"),
    ):
        with pytest.raises(InputError, match=words):
            host(**changed)
    model_config = host.run.forward_backward.model[0].config
    model_config.finalize_model_grads_func = None
    with pytest.raises(InputError, match="finalize_model_grads_func is not set"):
        host()


def test_a_loss_whose_results_megatron_validates(host: Any) -> None:
    """As that of Megatron-LM's pretrain_gpt.py; outside a step its machine refuses to."""

    def validated(loss_func: Callable[..., Any], output: Any) -> Any:
        found = loss_func(output)
        machine.validate_result(
            result=found[0], rejection_func=torch.isnan, message="found NaN", fatal=True
        )
        return found

    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_func = forward_step(data_iterator, model)
        return output, partial(validated, loss_func)

    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode.VALIDATE_RESULTS)
    machine = get_rerun_state_machine()
    try:
        with pytest.raises(AssertionError, match="outside of the forward-backward pass"):
            machine.validate_result(torch.ones(1), torch.isnan, message="", fatal=True)
        with host(step=step).probe.open(1) as probe:
            assert probe.add(np.full(3, 8)).usable().domains
    finally:
        destroy_rerun_state_machine()


def test_documents_end_where_the_configuration_says(host: Any) -> None:
    """Losses behind the end of a document are not probed where training does not see them."""
    masked = replace(host.config.data, eod_mask_loss=True)
    tokens = []
    for data in (host.config.data, masked):
        with host(data=data).probe.open(1) as probe:
            tokens.append(sum(probe.add(np.full(3, 8)).tokens_DB.sum(axis=1)))
    assert tokens[1] < tokens[0]


def test_a_frozen_part_stays_in_evaluation_mode(host: Any) -> None:
    module = host.run.forward_backward.model[0].module
    module.decoder.layers[0].eval()
    before = [part.training for part in module.modules()]
    with host().probe.open(1) as probe:
        probe.add(np.full(3, 8))
    assert [part.training for part in module.modules()] == before
    assert len(set(before)) == 2


def test_a_loss_that_is_a_mean_is_refused(host: Any) -> None:
    def mean(loss_func: Callable[..., Any], output: Any) -> Any:
        loss, tokens, rows = loss_func(output)
        return loss / tokens, rows

    def step(data_iterator: Any, model: Any) -> Any:
        output, loss_func = forward_step(data_iterator, model)
        return output, partial(mean, loss_func)

    remixer = host(step=step)
    with (
        pytest.raises(TrainingError, match=r"returns a mean; return \(summed loss, tokens, dict\)"),
        remixer.probe.open(1) as probe,
    ):
        probe.add(np.full(3, 8))
