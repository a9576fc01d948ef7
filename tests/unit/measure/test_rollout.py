"""Rollouts on one rank: what they measure, and that training never knows of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler

from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.errors import InputError, RolloutError
from megatron_tikmix.measure.rollouts import RolloutService, checked_weights
from megatron_tikmix.measure.shards import OptimizerSnapshot
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.optimizer import distributed_optimizers
from megatron_tikmix.megatron.samples import stack
from megatron_tikmix.megatron.step import train_step
from megatron_tikmix.mixture.blending import StageBlend
from megatron_tikmix.seeds import derived_seed
from megatron_tikmix.training.loop import Run
from tests.conftest import overridden
from tests.rollout_runs import (
    DROPOUT,
    THREE,
    bytes_alive,
    candidates,
    failing,
    job,
    losses_of_steps,
    rollouts_of,
    settled,
    state_digests,
    trained,
)

ITERS = 3


@pytest.fixture
def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Micro-batches of 3 for task items of 4: the last one is padded."""
    return overridden(
        settings,
        {
            "model.num_layers": 2,
            "train.micro_batch_size": 3,
            "train.global_batch_size": 6,
            "remix.interval_samples": 24,
            "probe.task_samples": 4,
            "train.train_iters": 20,
        },
    )


@pytest.fixture
def parallel(small: dict[str, Any]) -> Iterator[Parallel]:
    with job(small) as parallel:
        yield parallel


@pytest.mark.parametrize("bf16", [False, True])
def test_training_goes_on_bit_for_bit(
    bf16: bool, small: dict[str, Any], parallel: Parallel
) -> None:
    small = overridden(small, {**DROPOUT, "model.bf16": bf16})
    expected = losses_of_steps(trained(small, parallel), 4)
    run = trained(small, parallel)
    rollouts = rollouts_of(run)
    before = settled(run)
    rollouts.data.of_tasks()  # a stream keeps its epoch's index once it has been read
    alive = bytes_alive()
    rollouts.measure(candidates(run.domains, *THREE), seed=7, iters=ITERS, repetitions=2)
    assert state_digests(run) == before
    assert bytes_alive() == alive
    # That the digests see what a step changes, so that equal ones mean something.
    assert losses_of_steps(run, 4) == expected
    changed = {kind for kind, value in settled(run).items() if value != before[kind]}
    assert changed == set(before) - {"gradient buffers", "gradients", "modes"}


def test_before_the_first_step_the_optimizer_stays_empty(
    small: dict[str, Any], parallel: Parallel
) -> None:
    expected = losses_of_steps(trained(small, parallel, iters=0), 2)
    run = trained(small, parallel, iters=0)
    rollouts_of(run).measure(candidates(run.domains, *THREE), seed=7, iters=1)
    assert all(not part.optimizer.state for part in distributed_optimizers(run.optimizer))
    assert losses_of_steps(run, 2) == expected


def reference_losses(run: Run) -> list[float]:
    """Each task's loss on its items that decide, by the plain model on one sample at a time."""
    model = run.forward_backward.model[0].module
    model.eval()
    losses = []
    for task in run.tasks:
        total, tokens = 0.0, 0.0
        for k in range(run.config.probe.task_samples):
            sample = stack([task.decide[k]])
            with torch.no_grad():
                loss = model(
                    sample["tokens"], sample["position_ids"], None, labels=sample["labels"]
                )
            total += float((loss * sample["loss_mask"]).double().sum())
            tokens += float(sample["loss_mask"].sum())
        losses.append(total / tokens)
    model.train()
    return losses


def test_outcomes_are_those_of_really_training(small: dict[str, Any], parallel: Parallel) -> None:
    """A run made afresh takes the same steps on the same samples, and is not put back."""
    run = trained(small, parallel)
    weights_ND = candidates(run.domains, *THREE[1:])
    measured = rollouts_of(run).measure(weights_ND, seed=7, iters=ITERS, repetitions=2)
    batch = run.config.train.global_batch_size
    for r in range(2):
        seed = derived_seed(7, r)
        for n, weights_D in enumerate(weights_ND):
            other = trained(small, parallel)
            before_V = np.array(reference_losses(other))
            data = TrainingData(other.config)
            streams = [data.stream(name, seed, 32) for name in data.names]
            places = [StageBlend(weights_D, batch, seed).locate(i) for i in range(ITERS * batch)]
            samples = [streams[domain][k] for domain, k in places]
            for step in range(ITERS):
                chosen = samples[step * batch : (step + 1) * batch]
                train_step(
                    other.forward_backward,
                    iter([stack(chosen[:3]), stack(chosen[3:])]),
                    2,
                    other.optimizer,
                    other.scheduler,
                    batch,
                )
            drops_V = before_V - np.array(reference_losses(other))
            np.testing.assert_allclose(measured.drops_RNV[r, n], drops_V, rtol=0, atol=2e-6)
            np.testing.assert_allclose(measured.before_V, before_V, rtol=1e-6)
    assert np.abs(measured.outcomes_NV).min() > 1e-3, "the drops must be far above the tolerance"
    # Two tasks of 4 samples, each in two micro-batches of 3, before and after 4 rollouts.
    assert measured.trained_tokens == 2 * 2 * ITERS * batch * 32
    assert measured.evaluated_tokens == (1 + 4) * 2 * 6 * 32


def test_candidates_do_not_touch_each_other(small: dict[str, Any], parallel: Parallel) -> None:
    run = trained(overridden(small, DROPOUT), parallel)
    rollouts = rollouts_of(run)
    even, low, high = candidates(run.domains, *THREE)

    def outcomes(*weights_ND: np.ndarray, seed: int = 7) -> np.ndarray:
        return rollouts.measure(np.array(weights_ND), seed=seed, iters=ITERS).outcomes_NV

    first = outcomes(even, low, high, low)
    assert (first[1] == first[3]).all()
    assert (outcomes(high, even, low) == first[[2, 0, 1]]).all()
    assert (first[1] != first[2]).any()
    assert (outcomes(even, seed=8) != first[:1]).any()
    # What is trained on gets better: the benefit sign.
    task_low, task_high = (rollouts.data.tasks.index(name) for name in ("low", "high"))
    assert first[1, task_low] > first[0, task_low] > first[2, task_low]
    assert first[2, task_high] > first[0, task_high] > first[1, task_high]


def test_dropout_is_shared_by_candidates_and_fresh_in_each_repetition(
    small: dict[str, Any], parallel: Parallel
) -> None:
    run = trained(overridden(small, DROPOUT), parallel)
    seen: list[tuple[bytes, ...]] = []
    real = run.forward_backward.forward_step_func

    def spy(*arguments: Any) -> Any:
        seen.append(torch.get_rng_state().numpy().tobytes())
        return real(*arguments)

    run.forward_backward.forward_step_func = spy
    rollouts_of(run).measure(candidates(run.domains, *THREE[:2]), seed=7, iters=1, repetitions=2)
    # 4 passes before, and then for each of 4 rollouts 2 micro-batches and 4 passes after.
    assert len(seen) == 4 + 4 * 6
    starts = [seen[4 + 6 * rollout] for rollout in range(4)]
    assert starts[0] == starts[1] != starts[2] == starts[3]
    assert seen[0] not in starts


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_lost_candidate_is_nan_and_the_others_are_not(
    bad: str, small: dict[str, Any], parallel: Parallel
) -> None:
    run = trained(small, parallel)
    run.forward_backward.model[0].ddp_config.check_for_nan_in_grad = True
    rollouts = rollouts_of(run)
    weights_ND = candidates(run.domains, (1, 1, 0), (1, 1, 1), (1, 0, 0))
    expected_NV = rollouts.measure(weights_ND, seed=7, iters=ITERS).outcomes_NV
    before = settled(run)
    real = run.forward_backward.forward_step_func

    def poisoned(iterator: Any, model: torch.nn.Module) -> Any:
        """Samples of the domain junk lose the loss, or its gradient only."""
        batch = next(iterator)
        losses, loss_function = real(iter([batch]), model)
        if "domain" in batch and (batch["domain"] == 2).any():
            if bad == "loss":
                losses = losses * float("inf")
            else:
                losses.register_hook(lambda gradient: gradient * float("nan"))
        return losses, loss_function

    run.forward_backward.forward_step_func = poisoned
    outcomes_NV = rollouts.measure(weights_ND, seed=7, iters=ITERS).outcomes_NV
    assert np.isnan(outcomes_NV[1]).all()
    assert (outcomes_NV[[0, 2]] == expected_NV[[0, 2]]).all()
    assert state_digests(run) == before
    assert run.forward_backward.model[0].ddp_config.check_for_nan_in_grad


@pytest.mark.parametrize("calls", [2, 5, 14], ids=["before", "first rollout", "second rollout"])
def test_an_error_restores_everything(
    calls: int, small: dict[str, Any], parallel: Parallel
) -> None:
    small = overridden(small, DROPOUT)
    expected = losses_of_steps(trained(small, parallel), 2)
    run = trained(small, parallel)
    rollouts = rollouts_of(run)
    before = settled(run)
    rollouts.data.of_tasks()
    alive = bytes_alive()
    failing(run, calls, ValueError("no more"))
    with pytest.raises(RolloutError, match="a rollout failed: ValueError: no more") as caught:
        rollouts.measure(candidates(run.domains, *THREE), seed=7, iters=ITERS)
    run.forward_backward.mended()
    assert isinstance(caught.value.__cause__, ValueError)
    assert state_digests(run) == before
    # An error that somebody keeps must not keep the snapshot with it.
    assert bytes_alive() < alive + sum(p.nbytes for p in run.forward_backward.model[0].parameters())
    del caught
    assert bytes_alive() == alive
    assert losses_of_steps(run, 2) == expected


def test_data_that_cannot_be_read_is_a_rollout_error(
    small: dict[str, Any], parallel: Parallel, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(small, parallel)
    rollouts = rollouts_of(run)
    before = settled(run)

    def no_batch(blended: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(rollouts, "_next_batch", no_batch)
    with pytest.raises(RolloutError, match="cannot be read: OSError: the disk is gone"):
        rollouts.measure(candidates(run.domains, *THREE), seed=7, iters=ITERS)
    assert state_digests(run) == before


def test_candidates_that_are_no_mixtures_are_refused() -> None:
    domains = ["a", "b"]
    with pytest.raises(InputError, match=r"shape \(2,\)"):
        checked_weights([1, 2], domains)
    with pytest.raises(InputError, match="at least one"):
        checked_weights(np.zeros((0, 2)), domains)
    with pytest.raises(InputError, match="sum to 1073741824"):
        checked_weights([[1, 2]], domains)
    with pytest.raises(InputError, match="sum to 1073741824"):
        checked_weights([[2**30 + 1, -1]], domains)
    with pytest.raises(InputError, match="weight of domain a"):
        checked_weights([[float("nan"), 1.0]], domains)
    with pytest.raises(InputError, match="give numbers"):
        checked_weights([["x", "y"]], domains)
    given = np.array([[2**30 - 5, 5]])
    assert (checked_weights(given, domains) == given).all()
    assert (checked_weights([[0.25, 0.75]], domains) == [[2**28, 3 * 2**28]]).all()


def test_a_service_of_one_rank(small: dict[str, Any], parallel: Parallel) -> None:
    run = trained(small, parallel)
    rollouts = rollouts_of(run)
    service = RolloutService(rollouts, seed=7, iters=1, repetitions=2)
    weights_ND = candidates(run.domains, *THREE)
    found = service.run(lambda probe: probe(weights_ND / 2**30))
    assert (found == rollouts.measure(weights_ND, seed=7, iters=1, repetitions=2).outcomes_NV).all()
    assert service.cost.rollouts == 6
    assert service.cost.trained_tokens == 6 * 6 * 32
    with pytest.raises(ZeroDivisionError):
        service.run(lambda probe: 1 // 0)


def test_progress_counts_rollouts(small: dict[str, Any], parallel: Parallel) -> None:
    run = trained(small, parallel)
    rollouts = rollouts_of(run)
    told: list[tuple[int, int]] = []
    rollouts._on_progress = lambda done, total: told.append((done, total))
    rollouts.measure(candidates(run.domains, *THREE[:2]), seed=7, iters=1, repetitions=2)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_buffers_and_modes_are_put_back(small: dict[str, Any], parallel: Parallel) -> None:
    """What a mixture of experts counts in buffers, say, or a part that was frozen with eval()."""
    run = trained(small, parallel)
    model = run.forward_backward.model[0].module
    model.register_buffer("counter", torch.zeros(1))
    frozen = model.decoder.layers[0]
    frozen.eval()
    modes: list[bool] = []
    counts: list[float] = []
    real = run.forward_backward.forward_step_func

    def counting(*arguments: Any) -> Any:
        counts.append(model.counter.item())
        modes.append(frozen.training)
        model.counter += 1
        return real(*arguments)

    run.forward_backward.forward_step_func = counting
    rollouts_of(run).measure(candidates(run.domains, *THREE[:2]), seed=7, iters=1)
    assert counts == [0, 1, 2, 3, *2 * [0, 1, 2, 3, 4, 5]]
    assert not any(modes)
    assert model.counter.item() == 0
    assert model.training
    assert not frozen.training


def test_the_loss_scale_is_put_back(small: dict[str, Any], parallel: Parallel) -> None:
    run = trained(small, parallel)
    (part,) = distributed_optimizers(run.optimizer)
    part.grad_scaler = DynamicGradScaler(1024.0, 1.0, 2.0, 0.5, growth_interval=5, hysteresis=1)
    part.grad_scaler.update(found_inf=False)
    snapshot = OptimizerSnapshot(run.optimizer)
    for _ in range(2):
        part.grad_scaler.update(found_inf=True)
        assert part.grad_scaler.scale.item() == 512.0
        snapshot.restore()
        assert part.grad_scaler.state_dict() == {
            "scale": torch.tensor([1024.0]),
            "growth_tracker": 1,
            "hysteresis_tracker": 1,
        }
