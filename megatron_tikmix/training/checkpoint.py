"""Checkpoints: megatron-core's dist_checkpointing, and the mixture's schedule beside it.

::

    checkpoints/
      latest_checkpointed_iteration.txt   replaced last, once everything else is on disk
      iter_0000080/                       megatron-core's shards, and
        tikmix.json                       iteration, consumed_samples, schedule, ledger
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from megatron_tikmix.errors import InputError
from megatron_tikmix.mixing import MixtureSchedule
from megatron_tikmix.parallel.collectives import (
    agree_on_input,
    barrier,
    broadcast_object,
    check_same_on_all_ranks,
)
from megatron_tikmix.parallel.initialize import Parallel
from megatron_tikmix.training.evaluate import gathered_parameters
from megatron_tikmix.training.optimizer_state import (
    mend_buckets,
    mend_torch_adam,
    unshare_steps,
)
from megatron_tikmix.training.rng import rng_state, set_rng_state
from megatron_tikmix.training.state import TrainState

_LATEST = "latest_checkpointed_iteration.txt"
_STATE = "tikmix.json"
# Loads at any tensor, pipeline and data-parallel size.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class Checkpointer:
    """Saves a run under one folder, and finds the newest checkpoint there. Collective.

    Args:
        fingerprint: what must not differ between saving and loading, by configuration field;
            fields of a checkpoint that are not named here may.
        keep: how many checkpoints to keep.
    """

    def __init__(
        self,
        folder: Path,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        parallel: Parallel,
        *,
        fingerprint: dict[str, Any],
        keep: int,
    ) -> None:
        self._folder = folder
        self._chunks = model
        self._model = unwrap_model(model)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._parallel = parallel
        self._fingerprint = fingerprint
        self._keep = keep
        mend_buckets(optimizer)

    def save(self, state: TrainState) -> Path:
        """Write a checkpoint; only when it is complete does it become the latest."""
        path = self._path(state.iteration)
        if self._parallel.is_main:
            shutil.rmtree(path, ignore_errors=True)  # what a killed save left
            path.mkdir(parents=True)
        barrier(self._parallel)
        with gathered_parameters(self._chunks):
            dist_checkpointing.save(self._sharded_state(is_loading=False), str(path))
        if self._parallel.is_main:
            record = {
                "iteration": state.iteration,
                "consumed_samples": state.consumed_samples,
                "skipped_iterations": state.skipped_iterations,
                "layout": self._layout(),
                "fingerprint": self._fingerprint,
                "schedule": state.schedule.to_json(),
                "domain_samples": state.schedule.domain_counts(state.consumed_samples).tolist(),
                "ledger": state.ledger,
            }
            _write(path / _STATE, json.dumps(record))
            _write(self._folder / _LATEST, f"{state.iteration}\n")
            # Later ones are there if an earlier checkpoint was gone back to; they stay.
            upto_now = [kept for kept in self._complete() if kept.name <= path.name]
            for old in upto_now[: -self._keep]:
                shutil.rmtree(old)
        barrier(self._parallel)
        return path

    def load_latest(self, state: TrainState, iteration: int | None = None) -> bool:
        """Bring the newest checkpoint's contents into the run; False when there is none.

        Parameters, optimizer and schedule are filled in place, `state` too.

        Args:
            iteration: load the checkpoint of this iteration, in place of the newest one.

        Raises:
            InputError: the run's data or seed is not the checkpoint's, or there is no checkpoint
                of `iteration`.
        """
        # Read once: ranks that saw different files would resume different runs, or not at all.
        record, problem = None, None
        if self._parallel.is_main:
            try:
                record = self._read(iteration)
            except InputError as error:
                problem = error
        agree_on_input(problem, self._parallel)
        record = broadcast_object(record, self._parallel)
        if record is None:
            return False
        path = self._path(record["iteration"])
        mend_torch_adam(self._optimizer)
        sharded = self._sharded_state(is_loading=True)
        same_layout = record["layout"] == self._layout()
        if not same_layout:  # random streams belong to ranks; other ranks start their own
            del sharded["rng_state"]
        loaded = dist_checkpointing.load(sharded, str(path))
        for index, chunk in enumerate(self._model):
            chunk.load_state_dict(loaded[f"model{index}"])
        self._optimizer.load_state_dict(loaded["optimizer"])
        unshare_steps(self._optimizer)
        self._scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            set_rng_state(loaded["rng_state"])
        state.iteration = record["iteration"]
        state.consumed_samples = record["consumed_samples"]
        state.skipped_iterations = record["skipped_iterations"]
        state.schedule = MixtureSchedule.from_json(
            record["schedule"], record["consumed_samples"], record.get("domain_samples")
        )
        state.ledger = record["ledger"]
        check_same_on_all_ranks(state.schedule.digest(), "the mixture schedule", self._parallel)
        return True

    def _read(self, iteration: int | None) -> dict[str, Any] | None:
        """A checkpoint's record (None: the newest one's), if there is one and it is of this run."""
        latest = self._folder / _LATEST
        if iteration is not None and self._path(iteration) not in self._complete():
            there = [str(int(path.name.removeprefix("iter_"))) for path in self._complete()]
            raise InputError(
                f"{self._folder} has no checkpoint of iteration {iteration}; it has "
                f"{', '.join(there) or 'none'}"
            )
        if iteration is None and not latest.is_file():
            return None
        try:
            path = self._path(int(latest.read_text()) if iteration is None else iteration)
            record: dict[str, Any] = json.loads((path / _STATE).read_text())
            fingerprint = record["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{latest} does not name a whole checkpoint ({error}); write the iteration of "
                f"another one beside it into it, or use another run_dir"
            ) from error
        for field, value in fingerprint.items():
            if field in self._fingerprint and self._fingerprint[field] != value:
                raise InputError(
                    f"{path}: was saved with {field} {value}, and the run has "
                    f"{self._fingerprint[field]}; resume with the same, or use another run_dir"
                )
        return record

    def _path(self, iteration: int) -> Path:
        return self._folder / f"iter_{iteration:07d}"

    def _complete(self) -> list[Path]:
        return sorted(path.parent for path in self._folder.glob(f"iter_*/{_STATE}"))

    def _layout(self) -> list[int]:
        groups = self._parallel.groups
        return [groups.tp.size(), groups.pp.size(), groups.dp.size(), len(self._model)]

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {**_SHARDING, "dp_cp_group": self._parallel.groups.dp_cp}
        state: dict[str, Any] = {
            f"model{index}": chunk.sharded_state_dict(metadata=metadata)
            for index, chunk in enumerate(self._model)
        }
        # Model chunks of one rank share parameter names, which global keys tell apart.
        state["optimizer"] = self._optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
        state["scheduler"] = self._scheduler.state_dict()
        groups = self._parallel.groups
        state["rng_state"] = ShardedObject(
            "rng_state",
            rng_state(),
            (groups.pp.size(), groups.tp.size(), groups.dp.size()),
            (groups.pp.rank(), groups.tp.rank(), groups.dp.rank()),
        )
        return state


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all, and onto the disk."""
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
