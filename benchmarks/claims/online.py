"""ODM and a DoReMi-style proxy: policies that set the mixture every few steps from training losses.

They look at no validation task, and cost no probe.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tikmix.config import RunConfig
from megatron_tikmix.measure.remixer import load_data
from megatron_tikmix.megatron.groups import initialize, shut_down
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.training.build import build
from megatron_tikmix.training.loop import Run, measure, open_stage, realised_mixture, train_interval
from megatron_tikmix.training.record import Recorder

Array = NDArray[np.float64]


class Online(Protocol):
    """Sees the mean training loss of each domain in the last steps, and answers with a mixture."""

    def next(self, loss: Mapping[str, float]) -> Array:
        """Weights (D,); a domain that was not drawn has no loss."""
        ...


class ODM:
    """Online Data Mixing (Albalak et al. 2023, arXiv 2312.02406): EXP3 whose reward is the loss.

    R̂_j ← α R̂_j + (1 − α) L_j / π_j for the domains that were drawn;
    π_j = (1 − D ε) softmax(ε' R̂)_j + ε,  ε_t = min(1/D, sqrt(ln D / (D t))), ε' the former ε.
    """

    def __init__(self, domains: Sequence[str], *, smoothing: float = 0.9) -> None:
        self._domains = list(domains)
        self._smoothing = smoothing
        D = len(self._domains)
        self._rewards_D = np.zeros(D)
        self._weights_D = np.full(D, 1 / D)
        self._exploration = 1 / D
        self._turn = 0

    def next(self, loss: Mapping[str, float]) -> Array:
        D = len(self._domains)
        for j, name in enumerate(self._domains):
            if name in loss:
                reward = loss[name] / self._weights_D[j]
                self._rewards_D[j] *= self._smoothing
                self._rewards_D[j] += (1 - self._smoothing) * reward
        self._turn += 1
        former = self._exploration
        self._exploration = min(1 / D, math.sqrt(math.log(D) / (D * self._turn)))
        scores_D = former * self._rewards_D
        softmax_D = np.exp(scores_D - scores_D.max())
        softmax_D /= softmax_D.sum()
        self._weights_D = (1 - D * self._exploration) * softmax_D + self._exploration
        return self._weights_D


class DoReMi:
    """The proxy of DoReMi (Xie et al. 2023, arXiv 2305.10429), at the grain of domains.

    α_j ← α_j exp(η max(L_j − L_j of the reference, 0)), normalised, and smoothed with uniform.
    The answer is the mean of α over the run. Two differences: the excess is that of a domain's
    mean loss, not of each token; and the proxy draws domains by α instead of weighting losses.
    """

    def __init__(
        self,
        domains: Sequence[str],
        *,
        reference: Mapping[str, float],
        rate: float = 1.0,
        smoothing: float = 1e-3,
    ) -> None:
        self._domains = list(domains)
        self._reference = dict(reference)
        self._rate = rate
        self._smoothing = smoothing
        self._weights_D = np.full(len(self._domains), 1 / len(self._domains))
        self._total_D = np.zeros(len(self._domains))

    def next(self, loss: Mapping[str, float]) -> Array:
        excess_D = np.array(
            [
                max(loss[name] - self._reference[name], 0.0) if name in loss else 0.0
                for name in self._domains
            ]
        )
        weights_D = self._weights_D * np.exp(self._rate * excess_D)
        weights_D /= weights_D.sum()
        self._weights_D = (1 - self._smoothing) * weights_D + self._smoothing / len(weights_D)
        self._total_D += self._weights_D
        return self._weights_D

    def mean(self) -> dict[str, float]:
        """The mixture that DoReMi hands on."""
        total_D = self._total_D / self._total_D.sum()
        return dict(zip(self._domains, total_D.tolist(), strict=True))


def pretrain(
    config: RunConfig, resolved: str, name: str, *, every: int, **options: Any
) -> dict[str, Any]:
    """Train with the policy `name` setting the mixture each `every` iterations, on one rank.

    Losses of tasks are measured where the configuration has boundaries, and at the end.
    """
    parallel = initialize(config.model, config.seed, config.timeout_minutes)
    try:
        data = load_data(config)
        recorder = Recorder(config, resolved, parallel)
        recorder.open_folder()
        run = build(config, data, recorder, parallel)
        recorder.begin("", run.state)
        policy: Online = ODM(data.names) if name == "odm" else DoReMi(data.names, **options)
        open_stage(run, None, measure(run))
        _train(run, policy, every)
        recorder.close()
        return {"mean_mixture": policy.mean()} if isinstance(policy, DoReMi) else {}
    finally:
        shut_down()


def _train(run: Run, policy: Online, every: int) -> None:
    state = run.state
    while not state.done:
        row = train_interval(run, until=min(state.iteration + every, state.train_iters))
        if state.done or state.iteration in run.config.boundaries:
            row = {**row, "task_loss": measure(run)}
        run.recorder.step(row, realised_mixture(run))
        if not state.done:
            weights = dict(zip(run.domains, policy.next(row["domain_loss"]).tolist(), strict=True))
            state.schedule.append(state.consumed_samples, Mixture(weights).rounded())
