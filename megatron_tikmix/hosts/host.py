"""TiKMiX in a training loop that is not ours, whatever the loop: what is bound to it in `Host`.

A loop

1. makes a :class:`Host`, with the state that its checkpoint holds, if any;
2. reads its micro-batches from :meth:`Host.micro_batches`;
3. hands over model, optimizer and forward step to :meth:`Host.connect` before its first step;
4. after each step asks :meth:`Host.due`, and if so calls :meth:`Host.decide`;
5. saves :meth:`Host.state` in its checkpoint.

:mod:`megatron_tikmix.hosts.megatron_lm` does so for NVIDIA's own loop.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tikmix.config import HostedConfig
from megatron_tikmix.data.dataset import BlendedDataset, DataParallelLoader
from megatron_tikmix.decision.decide import Boundary
from megatron_tikmix.decision.ledger import LEDGER, Ledger, StageRow
from megatron_tikmix.errors import InputError
from megatron_tikmix.hosts.megatron_core import build_remixer, open_data
from megatron_tikmix.jsonl import json_line
from megatron_tikmix.measure.remixer import Remixer
from megatron_tikmix.megatron.collectives import (
    broadcast_object,
    check_same_on_all_ranks,
    make_on_all_ranks,
)
from megatron_tikmix.megatron.groups import Parallel
from megatron_tikmix.megatron.samples import Sample
from megatron_tikmix.mixture.schedule import MixtureSchedule

STATE_SCHEMA = 1
"""The version of :meth:`Host.state`."""


class Host:
    """A schedule of mixtures, its ledger and its decisions, in another's loop. Collective.

    Args:
        state: what :meth:`state` returned when the loop's checkpoint was saved; None: a new run.
        iteration, consumed_samples: where the loop stands.

    Raises:
        InputError: on every rank: the data cannot be trained on, or the state is not that of this
            configuration or of this place.
    """

    def __init__(
        self,
        config: HostedConfig,
        parallel: Parallel,
        *,
        state: str | None = None,
        iteration: int = 0,
        consumed_samples: int = 0,
    ) -> None:
        self.config = config
        self.parallel = parallel
        self.data = open_data(config, parallel)
        self._folder = Path(config.run_dir)
        self._remixer: Remixer | None = None
        if state is None and consumed_samples:
            raise InputError(
                f"the checkpoint of iteration {iteration} was saved without TiKMiX, and a mixture "
                f"that begins in the middle of a run is not supported yet; start from iteration 0"
            )
        if state is None:
            self.schedule = self.data.initial_schedule()
            rows = [StageRow.first(self.schedule.mixture(0))]
        else:
            self.schedule, rows = make_on_all_ranks(
                parallel, lambda: self._restored(state, consumed_samples)
            )
        check_same_on_all_ranks(self.schedule.digest(), "the mixture schedule", parallel)
        self.ledger = make_on_all_ranks(parallel, lambda: self._opened(rows))
        self._dataset = BlendedDataset(self.schedule, self.data.streams, parallel)
        self._begin = consumed_samples

    def _restored(
        self, state: str, consumed_samples: int
    ) -> tuple[MixtureSchedule, list[StageRow]]:
        saved = json.loads(state)
        if saved.get("schema") != STATE_SCHEMA:
            raise InputError(
                f"the checkpoint's mixture has schema {saved.get('schema')}, and this version "
                f"reads {STATE_SCHEMA}; use the version that wrote it"
            )
        for name, now in self._identity().items():
            if saved["identity"][name] != now:
                raise InputError(
                    f"{name} is {now}, and the checkpoint was trained with "
                    f"{saved['identity'][name]}; samples would be lost or repeated: set it back"
                )
        schedule = MixtureSchedule.from_json(saved["schedule"])
        begun = schedule.stages[-1].start_sample
        if begun > consumed_samples:
            raise InputError(
                f"the checkpoint's newest mixture begins at sample {begun}, and the loop stands at "
                f"{consumed_samples}; load the checkpoint whole, its arguments and iteration too"
            )
        return schedule, list(Ledger.from_json(saved["ledger"], self._folder))

    def _identity(self) -> dict[str, Any]:
        """What must be the same as when the checkpoint was saved, for the order of samples."""
        train, data = self.config.train, self.config.data
        tokens = {name: self.data.manifest.split(name, "train").tokens for name in self.data.names}
        return {
            "seed": self.config.seed,
            "global batch size": train.global_batch_size,
            "batch-size ramp-up": train.rampup_batch_size,
            "sequence length": data.sequence_length,
            "domains' training tokens": tokens,
        }

    def _opened(self, rows: list[StageRow]) -> Ledger:
        """Return the ledger; the main rank's writes to its file, which is brought to these rows."""
        if not self.parallel.is_main:
            return Ledger(rows)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = "".join(json_line(row.to_json()) for row in rows)
            (self._folder / LEDGER).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self._folder} cannot be written to: {error}") from error
        return Ledger(rows, run_dir=self._folder)

    def micro_batches(self) -> Iterator[Sample]:
        """Yield this data-parallel rank's micro-batches from where the loop stands, to its end.

        Each interval is opened when its first micro-batch is asked for, after its mixture was
        decided. Not collective: only some ranks read. :meth:`prepare` has written what they need.
        """
        config, parallel = self.config.train, self.parallel
        dataset = BlendedDataset(self.schedule, self.data.streams)
        loader = DataParallelLoader(
            dataset,
            micro_batch_size=config.micro_batch_size,
            data_parallel_rank=parallel.data_parallel_rank,
            data_parallel_size=parallel.data_parallel_size,
            num_workers=self.config.data.num_workers or 0,
        )
        total = config.consumed_samples(config.train_iters)
        consumed = self._begin
        while consumed < total:
            end = self._interval_end(consumed)
            yield from loader.interval(consumed, end - consumed)
            consumed = end

    def _interval_end(self, consumed_samples: int) -> int:
        """The sample at which the interval ends that `consumed_samples` lies in."""
        train = self.config.train
        ends = [train.consumed_samples(at) for at in self.config.boundaries]
        total = train.consumed_samples(train.train_iters)
        return next((end for end in ends if end > consumed_samples), total)

    def prepare(self) -> None:
        """Write, on the main rank, the indices that the interval needs. Collective."""
        consumed = self._begin
        self._dataset.prepare(consumed, self._interval_end(consumed) - consumed)

    def connect(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        opt_param_scheduler: OptimizerParamScheduler | None,
        forward_step_func: Callable[..., Any],
    ) -> None:
        """Take what influence is measured with, before the first step. Collective.

        Raises:
            InputError: as :func:`~megatron_tikmix.hosts.megatron_core.build_remixer`.
        """
        if self.config.decides:
            self._remixer = build_remixer(
                self.config,
                self.data,
                model,
                optimizer,
                opt_param_scheduler,
                forward_step_func,
                self.parallel,
            )

    def due(self, iteration: int) -> bool:
        """Return whether an interval ends with this iteration, and the next has no stage yet."""
        begun = self.schedule.stages[-1].start_sample
        reached = self.config.train.consumed_samples(iteration)
        return iteration in self.config.boundaries and reached > begun

    def decide(self, iteration: int) -> StageRow:
        """Decide the mixture of the interval that begins here, and open its stage. Collective.

        Returns:
            the row of the ledger, the same on every rank, with its bank by reference.
        """
        train = self.config.train
        consumed = train.consumed_samples(iteration)
        at = Boundary.of(
            self.schedule,
            self.ledger,
            iteration=iteration,
            consumed_samples=consumed,
            interval_samples=self._interval_end(consumed) - consumed,
        )
        assert self._remixer is not None, "connect comes before the first step"
        decision = self._remixer.remix(at)
        self.schedule.append(consumed, decision.mixture)
        check_same_on_all_ranks(self.schedule.digest(), "the mixture schedule", self.parallel)
        if self.parallel.is_main:
            self.ledger.append(decision.row(at))
        row = broadcast_object(
            self.ledger[-1].to_json() if self.parallel.is_main else None, self.parallel
        )
        if not self.parallel.is_main:
            self.ledger.append(StageRow.from_json(row, self._folder))
        self._begin = consumed
        self.prepare()
        return self.ledger[-1]

    def state(self) -> str:
        """Return all that a checkpoint must hold, as JSON, the same on every rank.

        It changes at boundaries alone. What those measured is in bank files, which it names.
        """
        return json.dumps(
            {
                "schema": STATE_SCHEMA,
                "identity": self._identity(),
                "schedule": self.schedule.to_json(),
                "ledger": self.ledger.to_json(),
            }
        )
