"""Gradients that are lost, zero, or all there is; and what a probe leaves behind."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tikmix.data.tasks import Task
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.measure.probe import InfluenceProbe
from megatron_tikmix.megatron.rng import rng_state
from megatron_tikmix.megatron.step import forward_step
from megatron_tikmix.training.loop import Run, boundary, train_interval
from tests.conftest import overridden
from tests.influence_reference import probe_of, whole_gradient
from tests.live_bytes import LiveBytes
from tests.one_rank import one_rank

VARIANTS: list[dict[str, Any]] = [
    {},
    {"data_parallel_mode": "replicated"},
    {"data_parallel_mode": "replicated", "task_group_size": 1},
    {"curvature": "squared_gradients"},
]


class Poisoned:
    """Probe data of which some passes have their loss multiplied by a number."""

    def __init__(self, data: Any, factors: dict[tuple[str, str], float]) -> None:
        self._data = data
        self._factors = factors
        self.domains, self.tasks = data.domains, data.tasks

    def of_task(self, task: int) -> list[dict[str, torch.Tensor]]:
        return self._with(self._data.of_task(task), "task", self.tasks[task].name)

    def of_domain(self, domain: int, *args: Any, **options: Any) -> Iterator[Any]:
        for batches in self._data.of_domain(domain, *args, **options):
            yield self._with(batches, "domain", self.domains[domain])

    def _with(self, batches: list[dict[str, torch.Tensor]], kind: str, name: str) -> Any:
        factor = self._factors.get((kind, name), 1.0)
        return [{**batch, "factor": torch.tensor(factor)} for batch in batches]


def poisoned_step(batches: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module) -> Any:
    batch = next(batches)
    losses, loss_sums = forward_step(iter([batch]), model)
    return losses * batch["factor"], loss_sums


def poisoned(run: Run, factors: dict[tuple[str, str], float], **fields: Any) -> InfluenceProbe:
    probe = probe_of(run, forward_step_func=poisoned_step, **fields)
    probe._data = Poisoned(probe._data, factors)
    return probe


def measure(probe: InfluenceProbe, count: int = 8) -> SubBatchBank:
    with probe.open(stage=1):
        return probe.add(np.full(len(probe.domains), count))


def buffers_are_empty(run: Run) -> bool:
    return all(
        not p.main_grad.any() and p.grad is None for p in run.forward_backward.model[0].parameters()
    )


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_domain_without_a_finite_gradient_is_left_out(trained: Run, bad: float) -> None:
    # Where the user asked megatron-core to stop at NaN, a probe does not.
    trained.forward_backward.model[0].ddp_config.check_for_nan_in_grad = True
    for fields in VARIANTS[:2]:
        clean = measure(probe_of(trained, **fields))
        bank = measure(poisoned(trained, {("domain", "high"): bad}, **fields))
        assert (bank.bad_domains, bank.bad_tasks) == (("high",), ())
        assert np.array_equal(bank.sums_DBV[[0, 2]], clean.sums_DBV[[0, 2]])
        matrix = bank.influence_matrix()
        assert matrix.domains == ("low", "junk")
        assert buffers_are_empty(trained)
    assert trained.forward_backward.model[0].ddp_config.check_for_nan_in_grad
    train_interval(trained, until=5)  # refuses a gradient that is not finite


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_a_task_without_a_finite_gradient_is_left_out(trained: Run) -> None:
    clean = measure(probe_of(trained))
    bank = measure(poisoned(trained, {("task", "low"): math.nan}))
    assert (bank.bad_domains, bank.bad_tasks) == ((), ("low",))
    high = clean.tasks.index("high")
    assert np.array_equal(bank.sums_DBV[:, :, high], clean.sums_DBV[:, :, high])
    assert bank.influence_matrix().tasks == ("high",)
    assert buffers_are_empty(trained)


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_all_gradients_lost_mean_no_reset(trained: Run) -> None:
    assert trained.remixer is not None
    prior = trained.state.schedule.mixture(-1)
    for kind, names in (("task", ("low", "high")), ("domain", ("low", "high", "junk"))):
        trained.remixer.probe = poisoned(trained, {(kind, name): math.nan for name in names})
        decision = trained.remixer.remix(boundary(trained))
        assert (decision.source, decision.mixture) == ("kept", prior)
        assert all(name in str(decision.reason) for name in names)
        assert decision.probe_tokens > 0
    assert buffers_are_empty(trained)


@pytest.mark.parametrize("trained", ["adam", "identity"], indirect=True)
def test_squared_gradients_leave_a_lost_domain_out(trained: Run) -> None:
    bank = measure(poisoned(trained, {("domain", "junk"): math.nan}, curvature="squared_gradients"))
    assert (bank.bad_domains, bank.bad_tasks) == (("junk",), ())
    assert np.isfinite(bank.influence_matrix().values_VD).all()


@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_zero_gradients_have_zero_influence(trained: Run) -> None:
    everything = [("task", "low"), ("task", "high")]
    everything += [("domain", "low"), ("domain", "high"), ("domain", "junk")]
    for fields in VARIANTS:
        bank = measure(poisoned(trained, dict.fromkeys(everything, 0.0), **fields))
        matrix = bank.influence_matrix()
        assert not matrix.values_VD.any()
        assert not matrix.standard_error_VD.any()


@pytest.mark.parametrize("trained", ["identity"], indirect=True)
def test_a_task_that_is_a_domain(trained: Run) -> None:
    """Its influence on itself is the squared norm of its gradient."""
    probe = probe_of(trained)
    stream = probe._data._open_stream(1, 1)
    probe._data.tasks = [Task("itself", stream, stream)]
    probe._data._task_samples = 32
    influence = measure(probe).influence_matrix().values_VD[0, 1]
    gradient_P, tokens = whole_gradient(trained, [stream[k] for k in range(32)])
    assert influence == pytest.approx((gradient_P / tokens).square().sum().item(), rel=1e-5)


def test_one_domain_and_one_task(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = overridden(settings, {"data.domains": ["low"], "tasks": {"low": {"domain": "low"}}})
    settings["probe"]["curvature"] = "identity"
    with one_rank(settings, tmp_path) as run:
        assert run.remixer is not None
        prior = run.state.schedule.mixture(-1)
        decision = run.remixer.remix(boundary(run))
        assert decision.mixture == prior
        assert decision.influence is not None
        assert decision.influence.values_VD.shape == (1, 1)
        assert decision.influence.values_VD[0, 0] > 0


# What a probe leaves behind -------------------------------------------------------------------


def test_a_probe_disturbs_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, the steps after it are bit for bit those of a run that had none."""
    dropout = {"model.hidden_dropout": 0.1, "model.attention_dropout": 0.1}
    settings = overridden(settings, {**dropout, "remix.interval_samples": 96})
    ends = []
    for probing in (False, True):
        with one_rank(settings, tmp_path) as run:
            for iteration in (3, 5, 7, 9):
                train_interval(run, until=iteration)
                if probing:
                    before = state_of(run)
                    measure(probe_of(run, **VARIANTS[iteration // 2 - 1]))
                    after = state_of(run)
                    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                    assert run.forward_backward.model[0].training
                    assert buffers_are_empty(run)
            ends.append((state_of(run), run.state.consumed_samples))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][0], ends[1][0], strict=True))


def state_of(run: Run) -> list[torch.Tensor]:
    """Parameters, optimizer state and random state."""
    inner = run.optimizer.chained_optimizers[0].optimizer
    state = [value for entry in inner.state.values() for value in entry.values()]
    tensors = [*run.forward_backward.model[0].parameters(), *state, torch.get_rng_state()]
    return [tensor.detach().clone() for tensor in tensors]


@pytest.mark.parametrize("fields", VARIANTS[:3])
@pytest.mark.parametrize("trained", ["adam"], indirect=True)
def test_peak_memory_is_trainings_and_the_kept_gradients(
    trained: Run, fields: dict[str, Any]
) -> None:
    probe = probe_of(trained, **fields)
    measure(probe)  # what is made once and kept (indices of an epoch) is made

    with LiveBytes() as training:
        train_interval(trained, until=trained.state.iteration + 1)
    with LiveBytes() as probing:
        measure(probe)
    kept = 2 * 4 * sum(p.numel() for p in trained.forward_backward.model[0].parameters())
    if "task_group_size" in fields:
        kept = kept * 3 // 2
    assert training.peak > kept, "a step that is too small to compare with"
    samples = 12 * 32 * (3 * 8 + 4)  # those of the longest pass, which training reads one by one
    state = rng_state()  # kept on the host, to be put back if a module drew from it
    streams = sum(stream.nbytes for stream in [state["cpu"], *state["tracker"].values()])
    assert streams < 50_000
    assert kept < probing.peak <= training.peak + kept + samples + streams
    assert probing.now() < 10_000, "bytes that were not given back"
