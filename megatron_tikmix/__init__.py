"""Megatron-Core pretraining whose domain mixture follows the model (TiKMiX).

The names of :data:`_MODULES` can be imported from here (docs/api.md says what each is). Each is
loaded when it is first asked for, so that importing this package imports neither torch nor
megatron-core, and a solver in a notebook never does.
"""

import importlib
from typing import TYPE_CHECKING, Any

from megatron_tikmix.megatron.cpu import install as _install

if TYPE_CHECKING:  # the same names, for mypy and editors; tests/unit/test_api.py compares both
    from megatron_tikmix.config import HostedConfig as HostedConfig
    from megatron_tikmix.data.builder import TrainingData as TrainingData
    from megatron_tikmix.data.dataset import BlendedDataset as BlendedDataset
    from megatron_tikmix.data.dataset import DataParallelLoader as DataParallelLoader
    from megatron_tikmix.decision.decide import Boundary as Boundary
    from megatron_tikmix.decision.decide import Decision as Decision
    from megatron_tikmix.decision.decide import decide_again as decide_again
    from megatron_tikmix.decision.explain import explain as explain
    from megatron_tikmix.decision.ledger import Ledger as Ledger
    from megatron_tikmix.decision.ledger import StageRow as StageRow
    from megatron_tikmix.hosts.megatron_core import build_remixer as build_remixer
    from megatron_tikmix.hosts.megatron_core import open_data as open_data
    from megatron_tikmix.influence.bank import SubBatchBank as SubBatchBank
    from megatron_tikmix.influence.matrix import InfluenceMatrix as InfluenceMatrix
    from megatron_tikmix.measure.remixer import Remixer as Remixer
    from megatron_tikmix.megatron.groups import Parallel as Parallel
    from megatron_tikmix.mixture.initial import propose_mixture as propose_mixture
    from megatron_tikmix.mixture.mixture import Mixture as Mixture
    from megatron_tikmix.mixture.schedule import MixtureSchedule as MixtureSchedule
    from megatron_tikmix.solve.constraints import DomainGroup as DomainGroup
    from megatron_tikmix.solve.constraints import MixtureConstraints as MixtureConstraints
    from megatron_tikmix.solve.constraints import epoch_caps as epoch_caps
    from megatron_tikmix.solve.objective import Goal as Goal
    from megatron_tikmix.solve.objective import Objective as Objective
    from megatron_tikmix.solve.solution import MixtureSolution as MixtureSolution
    from megatron_tikmix.solve.tikmix_d import solve_tikmix_d as solve_tikmix_d
    from megatron_tikmix.solve.tikmix_m import solve_tikmix_m as solve_tikmix_m
else:  # not seen by mypy, which would take any name at all for public

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value  # asked for once
        return value


__version__ = "0.1.0"

_MODULES = {
    "BlendedDataset": "data.dataset",
    "Boundary": "decision.decide",
    "DataParallelLoader": "data.dataset",
    "Decision": "decision.decide",
    "DomainGroup": "solve.constraints",
    "Goal": "solve.objective",
    "HostedConfig": "config",
    "InfluenceMatrix": "influence.matrix",
    "Ledger": "decision.ledger",
    "Mixture": "mixture.mixture",
    "MixtureConstraints": "solve.constraints",
    "MixtureSchedule": "mixture.schedule",
    "MixtureSolution": "solve.solution",
    "Objective": "solve.objective",
    "Parallel": "megatron.groups",
    "Remixer": "measure.remixer",
    "StageRow": "decision.ledger",
    "SubBatchBank": "influence.bank",
    "TrainingData": "data.builder",
    "build_remixer": "hosts.megatron_core",
    "decide_again": "decision.decide",
    "epoch_caps": "solve.constraints",
    "explain": "decision.explain",
    "open_data": "hosts.megatron_core",
    "propose_mixture": "mixture.initial",
    "solve_tikmix_d": "solve.tikmix_d",
    "solve_tikmix_m": "solve.tikmix_m",
}
"""Every public name, and the module of this package that it comes from."""

__all__ = list(_MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
del _install
