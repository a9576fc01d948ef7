"""Reads a whole schedule from a file, or from another run.

A file, YAML or JSON, is a list of stages, alone or under ``stages``::

    stages:
      - {start_sample: 0,       weights: {code: 0.5, prose: 0.5}}
      - {start_sample: 1024000, weights: {code: 0.7, prose: 0.3}}

A run is named by its folder, or by its ledger ``mixture.jsonl``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_tikmix.errors import InputError
from megatron_tikmix.jsonl import read_objects
from megatron_tikmix.mixture.batch_sizes import BatchSizes
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.mixture.schedule import MixtureSchedule

_LEDGER, _CONFIG = "mixture.jsonl", "config.yaml"


@dataclass(frozen=True)
class ScheduleFile:
    """The stages in a file.

    Attributes:
        path: the file.
        starts: global index of each stage's first sample.
        weights: each stage's weights by domain name; omitted domains have weight 0.
        config: the resolved configuration of the run if the file is a run's ledger, else None.
    """

    path: Path
    starts: Sequence[int]
    weights: Sequence[Mapping[str, float]]
    config: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: str | Path) -> "ScheduleFile":
        """Read a file, or the ledger of a run.

        Raises:
            InputError: it cannot be read, or names the stage and field that are wrong.
        """
        path = Path(path)
        path = path / _LEDGER if path.is_dir() else path
        stages = _parsed(path)
        if isinstance(stages, dict):
            stages = stages.get("stages")
        if not isinstance(stages, list) or not stages:
            raise InputError(
                f"{path} holds no schedule: give a list of stages, each with start_sample and "
                f"weights, or the ledger ({_LEDGER}) of a run"
            )
        rows = [_stage(f"{path}: stage {number}", row) for number, row in enumerate(stages)]
        config = path.with_name(_CONFIG)
        of_run = path.name == _LEDGER and config.is_file()
        return cls(
            path,
            [start for start, _ in rows],
            [weights for _, weights in rows],
            _parsed(config) if of_run else None,
        )

    def schedule(self, domains: Sequence[str], blocks: BatchSizes, seed: int) -> MixtureSchedule:
        """Return the schedule of these stages over `domains`.

        Raises:
            InputError: a stage names an unknown domain, or does not start between two batches.
        """
        schedule = MixtureSchedule(domains, blocks, seed)
        for number, (start, weights) in enumerate(zip(self.starts, self.weights, strict=True)):
            where = f"{self.path}: stage {number}"
            unknown = sorted(set(weights) - set(domains))
            if unknown:
                raise InputError(
                    f"{where}: unknown domains {', '.join(unknown)}; the run's are "
                    f"{', '.join(domains)}"
                )
            if number and start > 0 and not blocks.is_end(start):
                below = int(blocks.samples_before(blocks.batch_of(start)))
                raise InputError(
                    f"{where}: start_sample {start} is within a global batch; the nearest ends of "
                    f"batches are {below} and {blocks.end_from(start)} "
                    f"(train.global_batch_size {blocks.size})"
                )
            try:
                mixture = Mixture({name: weights.get(name, 0.0) for name in domains})
                schedule.append(start, mixture)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        return schedule

    def differences(self, settings: Mapping[str, Any], domains: Sequence[str]) -> list[str]:
        """Return in words the settings that keep this run from serving the other run's samples.

        Args:
            settings: values of this run, by dotted name of a configuration field.
            domains: those of this run, in order.

        Returns:
            one phrase for each difference; empty if both runs serve the same samples.
        """
        if self.config is None:
            return ["it is not a run's"]
        found = []
        for name, value in settings.items():
            former: Any = self.config
            for key in name.split("."):
                former = former.get(key) if isinstance(former, Mapping) else None
            if former != value:
                found.append(f"{name} was {former} and is {value}")
        if list(self.weights[0]) != list(domains):
            found.append("its domains are others, or in another order")
        return found


def _parsed(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such schedule, nor the ledger of a run") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    try:
        if path.suffix == ".jsonl":
            return read_objects(path, "one stage a line")
        return yaml.safe_load(text)  # JSON is YAML
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path}: neither YAML nor JSON: {problem}") from error


def _stage(where: str, row: Any) -> tuple[int, dict[str, float]]:
    if not isinstance(row, dict) or not {"start_sample", "weights"} <= set(row):
        raise InputError(f"{where} must have the fields start_sample and weights")
    start, weights = row["start_sample"], row["weights"]
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise InputError(f"{where}: start_sample must be a whole number of samples, not {start!r}")
    if not isinstance(weights, dict) or not weights:
        raise InputError(f"{where}: weights must give domains and their weights")
    return start, {str(name): weight for name, weight in weights.items()}
