"""Checkpoints: megatron-core's dist_checkpointing, and the mixture's schedule beside it.

A checkpoint's fingerprint holds the settings and data that a resumed run must share with it.
"""

import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model

from megatron_tikmix.config import RunConfig
from megatron_tikmix.config.sections import MAY_CHANGE
from megatron_tikmix.data.builder import TrainingData
from megatron_tikmix.decision.ledger import Ledger
from megatron_tikmix.errors import InputError
from megatron_tikmix.megatron.collectives import (
    agree_on_input,
    barrier,
    broadcast_object,
    check_same_on_all_ranks,
    first_problem,
    gather_objects,
)
from megatron_tikmix.megatron.faults import mend_buckets, mend_torch_adam, unshare_steps
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.rng import rng_state, set_rng_state
from megatron_tikmix.megatron.step import gathered_parameters
from megatron_tikmix.mixture.schedule import MixtureSchedule
from megatron_tikmix.training.checkpoint_files import (
    RECORD,
    CheckpointFolder,
    Manifest,
    damage,
    read_record,
    sizes_and_digests,
    write_whole,
)
from megatron_tikmix.training.checkpoint_writer import ShardSaving
from megatron_tikmix.training.state import LossSpikes, TrainState

_log = logging.getLogger(__name__)

# Such a checkpoint can be loaded at any tensor, pipeline and data-parallel size.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


# Keys of an optimizer's parameter group: those that identify it, and those that a resumed run takes
# from its configuration. (From 0.19 on megatron-core also identifies groups by learning rates.)
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_CONFIGURED = ("max_lr", "min_lr", "betas", "eps")


@dataclass(frozen=True)
class _Pending:
    """A save in progress; `record` is the text of tikmix.json on the main rank, else empty."""

    saving: ShardSaving
    unfinished: Path
    iteration: int
    record: str


class Checkpointer:
    """Saves a run under one folder, and finds the newest whole checkpoint there. Collective.

    Args:
        fingerprint: values that must not differ between saving and loading, by configuration
            field; fields of a checkpoint that are not in it are not compared.
        allow_changed: fields of the fingerprint that may differ nevertheless.
        keep, keep_every: the newest `keep` checkpoints are kept, and those of iterations
            divisible by `keep_every`.
        async_save: write in the background.
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
        allow_changed: Sequence[str] = (),
        keep: int,
        keep_every: int | None = None,
        async_save: bool = False,
    ) -> None:
        self._files = CheckpointFolder(folder)
        self._chunks = model
        self._model = unwrap_model(model)
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._parallel = parallel
        self._fingerprint = fingerprint
        self._allow_changed = allow_changed
        self._keep, self._keep_every = keep, keep_every
        self._async_save = async_save
        self._pending: _Pending | None = None
        mend_buckets(optimizer)

    def save(self, state: TrainState, *, wait: bool = False) -> bool:
        """Write a checkpoint; it becomes the latest only when it is complete and on disk.

        With `async_save`, unless `wait`, return when the writing has begun; :meth:`poll`, or the
        next save, finishes it.

        Returns:
            False, on every rank, if it could not be written: the former checkpoint is then still
            the latest, and an error is logged.
        """
        self.finish()
        unfinished, problem = self._make_folder(state.iteration)
        if problem is not None or unfinished is None:
            return self._give_up(state.iteration, None, problem)
        with gathered_parameters(self._chunks):
            saving = ShardSaving(
                self._sharded_state(is_loading=False),
                unfinished,
                self._parallel,
                in_background=self._async_save and not wait,
            )
        # Serialised now, since training goes on and changes the state.
        record = json.dumps(self._record(state)) if self._parallel.is_main else ""
        self._pending = _Pending(saving, unfinished, state.iteration, record)
        return True if self._async_save and not wait else self.finish()

    def is_writing(self) -> bool:
        """Return whether a process of this rank is still writing the pending save."""
        return self._pending is not None and not self._pending.saving.written()

    def poll(self, writing: bool) -> None:
        """Finish the pending save if its files are written. Collective if they are.

        Args:
            writing: whether any rank :meth:`is_writing`.
        """
        if self._pending is not None and not writing:
            self.finish()

    def finish(self) -> bool:
        """Wait for the pending save, if any; return False if it failed. Collective."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        problem = pending.saving.finish() or self._complete(pending)
        if problem is not None:
            return self._give_up(pending.iteration, pending.unfinished, problem)
        if self._parallel.is_main:
            try:
                self._files.prune(pending.iteration, self._keep, self._keep_every)
            except OSError as error:
                _log.warning("an old checkpoint cannot be deleted: %s", error)
        barrier(self._parallel)
        return True

    def _make_folder(self, iteration: int) -> tuple[Path | None, str | None]:
        """Make an empty folder on the main rank; return it, or the reason why there is none."""
        unfinished: Path | None = None
        problem = None
        if self._parallel.is_main:
            try:
                unfinished = self._files.begin(iteration)
            except OSError as error:
                problem = str(error)
        begun: tuple[Path | None, str | None] = broadcast_object(
            (unfinished, problem), self._parallel
        )
        return begun

    def _complete(self, pending: _Pending) -> str | None:
        """Make the written files the latest checkpoint; return the reason if that fails."""
        manifest: Manifest = {}
        problem = None
        try:
            if self._parallel.is_main:
                write_whole(pending.unfinished / RECORD, pending.record)
            manifest = sizes_and_digests(pending.unfinished, self._own_files(pending.unfinished))
        except OSError as error:
            problem = str(error)
        problem = first_problem(problem, self._parallel)
        if problem is not None:
            return problem
        for part in gather_objects(manifest, self._parallel):
            manifest |= part
        if self._parallel.is_main:
            try:
                self._files.complete(pending.unfinished, pending.iteration, manifest)
            except OSError as error:
                problem = str(error)
        return first_problem(problem, self._parallel)

    def _give_up(self, iteration: int, unfinished: Path | None, problem: str | None) -> bool:
        if self._parallel.is_main:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
            _log.error(
                "THE CHECKPOINT OF ITERATION %d WAS NOT SAVED: %s; training goes on, and a restart "
                "would go back to the checkpoint before; make room in %s",
                iteration,
                problem,
                self._files.folder,
            )
        barrier(self._parallel)
        return False

    def _own_files(self, path: Path) -> list[str]:
        """Return the files this rank checksums: its shards, and on the main rank all others."""
        names = [file.name for file in path.iterdir()]
        shards = [name for name in names if name.startswith("__") and name.endswith(".distcp")]
        own = [name for name in shards if name.startswith(f"__{self._parallel.rank}_")]
        return sorted(own + (sorted(set(names) - set(shards)) if self._parallel.is_main else []))

    def _record(self, state: TrainState) -> dict[str, Any]:
        return {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "skipped_iterations": state.skipped_iterations,
            "loss_spikes": asdict(state.spikes),
            "layout": self._layout(),
            "fingerprint": self._fingerprint,
            "schedule": state.schedule.to_json(),
            "domain_samples": state.schedule.domain_counts(state.consumed_samples).tolist(),
            "ledger": state.ledger.to_json(),
        }

    def load_latest(self, state: TrainState, iteration: int | None = None) -> bool:
        """Load the newest undamaged checkpoint into the run; return False if there is none.

        Parameters, optimizer, scheduler and `state` are filled in place. A damaged checkpoint is
        named in a warning, and the one before it is loaded.

        Args:
            iteration: load the checkpoint of this iteration instead of the newest one.

        Raises:
            InputError: the run's fingerprint differs from the checkpoint's, there is no
                checkpoint of `iteration`, or all are damaged.
        """
        record = self._choose(iteration)
        if record is None:
            return False
        path = self._files.path(record["iteration"])
        mend_torch_adam(self._optimizer)
        sharded = self._sharded_state(is_loading=True)
        saved = record["layout"]
        same_layout = saved == self._layout()[: len(saved)]  # older ones do not name the device
        if not same_layout:  # random streams belong to ranks and devices: start new ones
            del sharded["rng_state"]
        loaded = dist_checkpointing.load(sharded, str(path))
        for index, chunk in enumerate(self._model):
            chunk.load_state_dict(loaded[f"model{index}"])
        _follow_configuration(loaded["optimizer"], self._optimizer.param_groups)
        self._optimizer.load_state_dict(loaded["optimizer"])
        unshare_steps(self._optimizer)
        self._scheduler.load_state_dict(loaded["scheduler"])
        if same_layout:
            set_rng_state(loaded["rng_state"])
        state.iteration = record["iteration"]
        state.consumed_samples = record["consumed_samples"]
        state.skipped_iterations = record["skipped_iterations"]
        state.spikes = LossSpikes(**record.get("loss_spikes", {}))
        domains = state.schedule.domains if "domains" in self._allow_changed else None
        state.schedule = MixtureSchedule.from_json(
            record["schedule"], record["consumed_samples"], record.get("domain_samples"), domains
        )
        known = record["schedule"]["domains"]
        state.added_domains = tuple(name for name in state.schedule.domains if name not in known)
        state.ledger = Ledger.from_json(record["ledger"], self._files.folder.parent)
        check_same_on_all_ranks(state.schedule.digest(), "the mixture schedule", self._parallel)
        return True

    def _choose(self, iteration: int | None) -> dict[str, Any] | None:
        """Return the record of the checkpoint to load, the same on every rank; None: start anew."""
        # Only the main rank looks: ranks that saw different files would resume different runs.
        found = None
        if self._parallel.is_main:
            files = self._files
            found = files.iterations(), files.newest_first(), files.pointer.exists()
        complete, candidates, begun = broadcast_object(found, self._parallel)
        if iteration is not None:
            if iteration not in complete:
                raise InputError(
                    f"{self._files.folder} has no checkpoint of iteration {iteration}; it has "
                    f"{', '.join(map(str, complete)) or 'none'}"
                )
            candidates = [iteration]
        elif not candidates and not begun:
            return None
        problems: list[str] = []
        for candidate in candidates:
            path = self._files.path(candidate)
            problem = damage(path, self._parallel.rank, self._parallel.world_size)
            problem = first_problem(problem, self._parallel)
            if problem is None:
                if problems and self._parallel.is_main:
                    _log.warning(
                        "damaged: %s; going on from the checkpoint of iteration %d, the newest one "
                        "that is whole",
                        "; ".join(problems),
                        candidate,
                    )
                return self._check_record(path)
            problems.append(problem)
        raise InputError(
            f"{self._files.pointer} does not name a whole checkpoint, and there is no other one "
            f"({problems[0] if problems else 'it holds no number'}); use another run_dir, or "
            f"delete {self._files.folder} to start anew"
        )

    def _check_record(self, path: Path) -> dict[str, Any]:
        """Return a checkpoint's record, the same on every rank; refuse another run's."""
        record: dict[str, Any] = {}
        problem = None
        if self._parallel.is_main:
            record = read_record(path)
            problem = self._refusal(path, record["fingerprint"])
        agree_on_input(problem, self._parallel)
        accepted: dict[str, Any] = broadcast_object(record, self._parallel)
        return accepted

    def _refusal(self, path: Path, saved: dict[str, Any]) -> InputError | None:
        words = difference(saved, self._fingerprint, self._allow_changed)
        if words is None:
            return None
        choices = ", ".join(MAY_CHANGE)
        return InputError(
            f"{path}: was saved {words}; resume with the same, use another run_dir, or name the "
            f"field in checkpoint.allow_changed if it is one of {choices} and is meant to change"
        )

    def _layout(self) -> list[int | str]:
        groups, device = self._parallel.groups, self._parallel.device.type
        return [groups.tp.size(), groups.pp.size(), groups.dp.size(), len(self._model), device]

    def _sharded_state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = {**_SHARDING, "dp_cp_group": self._parallel.groups.dp_cp}
        state: dict[str, Any] = {
            f"model{index}": chunk.sharded_state_dict(metadata=metadata)
            for index, chunk in enumerate(self._model)
        }
        # The chunks of a rank use the same parameter names; their global keys differ.
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


def _follow_configuration(saved: Any, groups: Sequence[dict[str, Any]]) -> None:
    """Replace settings in the saved optimizer state by those configured for `groups`."""
    if not isinstance(saved, dict):
        return
    own = {tuple(group.get(name) for name in _IDENTITY): group for group in groups}
    for key, value in saved.items():
        if key != "param_groups":
            _follow_configuration(value, groups)
            continue
        for group in value:
            configured = own.get(tuple(group.get(name) for name in _IDENTITY), {})
            group.update({name: configured[name] for name in _CONFIGURED if name in configured})


# Fields of the model's configuration that a resumed run may not change.
_ARCHITECTURE = [
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "normalization",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "apply_residual_connection_post_layernorm",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "softmax_scale",
    "activation_func_clamp_value",
    "glu_linear_offset",
    "share_embeddings_and_output_weights",
    "make_vocab_size_divisible_by",
]


def fingerprint(config: RunConfig, data: TrainingData) -> dict[str, Any]:
    """Return the values that a resumed run must share with its checkpoint, by configuration field.

    `tokens`, `files` and `tokenizer` come from the manifest; the latter two are None, and then not
    compared, where the manifest does not have them.
    """
    splits = {name: data.manifest.split(name, "train") for name in data.names}
    return {
        "seed": config.seed,
        "data.sequence_length": config.data.sequence_length,
        "data.reset_position_ids": config.data.reset_position_ids,
        "data.reset_attention_mask": config.data.reset_attention_mask,
        "data.eod_mask_loss": config.data.eod_mask_loss,
        "train.global_batch_size": config.train.global_batch_size,
        "train.rampup_batch_size": config.train.rampup_batch_size,
        "domains": data.names,
        "tokens": {name: split.tokens for name, split in splits.items()},
        "files": {name: split.checksum for name, split in splits.items()},
        "tokenizer": data.manifest.tokenizer_checksum,
        "vocab_size": data.manifest.vocab_size,
        **{f"model.{name}": _plain(getattr(config.model, name, None)) for name in _ARCHITECTURE},
        "model.activation_func": config.model.activation_func.__name__,
    }


def _plain(value: Any) -> Any:
    """Return `value` as text if it is a list or tuple, which JSON would not tell apart."""
    return str(value) if isinstance(value, tuple | list) else value


def difference(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()
) -> str | None:
    """Return in words the first field whose value differs from the checkpoint's, or None.

    Args:
        saved, now: fingerprints; fields that only one of them has are not compared.
        allowed: fields that may differ, `checkpoint.allow_changed`.
    """
    for field, value in saved.items():
        if field not in now or now[field] == value:
            continue
        # Domains may be added, but not removed.
        if field in allowed and not (field == "domains" and set(value) - set(now[field])):
            continue
        words = _in_words(field, value, now[field])
        if words is not None:
            return words
    return None


def _in_words(field: str, saved: Any, now: Any) -> str | None:
    if field == "domains" and set(saved) != set(now):
        gone, new = sorted(set(saved) - set(now)), sorted(set(now) - set(saved))
        parts = [
            f"domains {', '.join(names)}, which the run {verb}"
            for names, verb in ((gone, "does not have"), (new, "has added"))
            if names
        ]
        return ("with " if gone else "without ") + " and without ".join(parts)
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in saved:
            if name in now and None not in (saved[name], now[name]) and saved[name] != now[name]:
                return f"with {field} of {name} {saved[name]}, and the run has {now[name]}"
        return None
    if field == "tokenizer" and None in (saved, now):
        return None
    return f"with {field} {saved}, and the run has {now}"
