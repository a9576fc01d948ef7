"""The ledger of a run: a row a stage of the mixture, with all that the stage was decided on.

::

    RUN_DIR/mixture.jsonl                  a row a stage, as one line of JSON
    RUN_DIR/banks/stage-00012-1f0c….npz    what the probe before stage 12 measured

A row names its bank file with its hash. A file that is missing, or is another one, costs what only
it could tell: that boundary's part in smoothing, and the stage's being decided again.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from megatron_tikmix.decision.audit import Audit, RolloutCost
from megatron_tikmix.decision.rules import Rules
from megatron_tikmix.errors import InputError
from megatron_tikmix.influence.bank import SubBatchBank
from megatron_tikmix.influence.matrix import InfluenceMatrix, completed
from megatron_tikmix.influence.stability import RankStability
from megatron_tikmix.jsonl import append_jsonl, read_jsonl
from megatron_tikmix.mixture.mixture import Mixture
from megatron_tikmix.solve.objective import Objective
from megatron_tikmix.solve.solution import MixtureSolution
from megatron_tikmix.solve.tikmix_m import MeasuredCandidates

LEDGER = "mixture.jsonl"
BANKS = "banks"

SCHEMA = 2
"""The version of a row. Rows of version 1, which do not name theirs, hold their bank, and lack the
rules that they were decided by."""


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of a boundary.

    Attributes:
        bank: the probe's inner products.
        candidates: TiKMiX-M's candidates and their outcomes, if rollouts measured any; over the
            domains and tasks of the completed influence matrix, in its order.
    """

    bank: SubBatchBank
    candidates: MeasuredCandidates | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        found = self.candidates
        candidates = found and {
            "weights": found.weights_ND.tolist(),
            "outcomes": found.outcomes_NV.tolist(),
        }
        return self.bank.to_json() | ({"candidates": candidates} if candidates else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Measured":
        """Undo :meth:`to_json`, to the bit (what was not finite is NaN)."""
        found = data.get("candidates")
        candidates = found and MeasuredCandidates(
            np.array(found["weights"], np.float64), np.array(found["outcomes"], np.float64)
        )
        return cls(SubBatchBank.from_json(data), candidates or None)

    def to_bytes(self) -> bytes:
        """Return the content of a bank file: NumPy's .npz, without pickles."""
        arrays: dict[str, Any] = {
            "sums": self.bank.sums_DBV,
            "tokens": self.bank.tokens_DB,
            **{
                name: np.array(getattr(self.bank, name), dtype=np.str_)
                for name in ("domains", "tasks", "bad_tasks")
            },
        }
        if self.candidates is not None:
            arrays |= {
                "candidate_weights": self.candidates.weights_ND,
                "candidate_outcomes": self.candidates.outcomes_NV,
            }
        content = io.BytesIO()
        np.savez(content, **arrays)
        return content.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Measured":
        """Undo :meth:`to_bytes`.

        Raises:
            ValueError: it is not the content of a bank file.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                names = [arrays[name].tolist() for name in ("domains", "tasks", "bad_tasks")]
                bank = SubBatchBank(arrays["sums"], arrays["tokens"], *names)
                candidates = None
                if "candidate_weights" in arrays:
                    candidates = MeasuredCandidates(
                        arrays["candidate_weights"], arrays["candidate_outcomes"]
                    )
        except (zipfile.BadZipFile, KeyError, OSError, EOFError) as error:
            raise ValueError(str(error)) from error
        return cls(bank, candidates)


@dataclass(frozen=True)
class BankFile:
    """A bank file, as a row of the ledger names it.

    Attributes:
        name: relative to the run's folder.
        sha256: of its content, in hex.
        run_dir: the run's folder; not part of the row.
    """

    name: str
    sha256: str
    run_dir: Path = field(default=Path(), compare=False)

    def read(self) -> Measured:
        """Return what the file holds.

        Raises:
            InputError: it is missing, or it is not the file that the row was written with.
        """
        path = self.run_dir / self.name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}, the bank of a stage, cannot be read: {error.strerror}; restore it from "
                f"a copy of the run"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise InputError(
                f"{path} is not the bank that {LEDGER} names: its sha256 is another one; restore "
                f"it from a copy of the run"
            )
        return Measured.from_bytes(content)

    def to_json(self) -> dict[str, str]:
        """Return the reference, for the row."""
        return {"file": self.name, "sha256": self.sha256}

    @classmethod
    def written(cls, run_dir: Path, stage: int, measured: Measured) -> "BankFile":
        """Write what was measured before `stage`, whole and on the disk, and return its reference.

        The name has a part of the hash in it, so that a stage which is decided once more, after a
        resume from an earlier checkpoint, leaves the files of other checkpoints alone.

        Raises:
            OSError: it cannot be written, for want of room say.
        """
        content = measured.to_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{BANKS}/stage-{stage:05}-{sha256[:12]}.npz"
        path = run_dir / name
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        return cls(name, sha256, run_dir)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageRow:
    """A row of the ledger: a stage of the mixture, and what it was decided on.

    What a boundary did not measure or solve is None. Other ranks than the main one know the
    mixture of a decision, and nothing of what it was decided on.
    """

    stage: int
    start_iteration: int
    """Optimizer steps done when the stage began."""

    start_sample: int
    """Global index of its first sample."""

    weights: Mapping[str, float]
    """The mixture: a weight for each domain, in the schedule's order."""

    source: str | None = None
    """`initial`, `schedule`, `added`, `tikmix_d`, `tikmix_m`, `fallback` or `kept`."""

    reason: str | None = None
    """The reason for the mixture, in one sentence."""

    task_loss: Mapping[str, float | None] = field(default_factory=dict)
    """Loss of each task's reporting items when the stage began, nats per token."""

    domain_samples: Mapping[str, int] = field(default_factory=dict)
    """Samples of each domain drawn before the stage."""

    domain_epochs: Mapping[str, float] = field(default_factory=dict)
    """The same as passes over each domain."""

    total_variation: float | None = None
    """Distance of the mixture from that of the stage before."""

    total_variation_noise: float | None = None
    """Distance by which noise alone would move the answer, at 95 %."""

    influence: InfluenceMatrix | None = None
    """The matrix that was solved on, of the domains and tasks that could be measured."""

    curvature: str | None = None
    """The inverse curvature that the probe used."""

    probe_tokens: int = 0
    probe_seconds: float = 0.0

    rules: Rules | None = None
    """The rules of the decision: goal, constraints, smoothing, policy."""

    solution: MixtureSolution | None = None
    """The solver's answer, which is not followed where the mixture was kept."""

    measured: Measured | BankFile | None = None
    rank_stability: RankStability | None = None
    rollout: RolloutCost | None = None
    audit: Audit | None = None

    @classmethod
    def first(cls, mixture: Mixture, reason: str = "the initial mixture") -> "StageRow":
        """Return the row of a run's first stage, which nothing was measured for."""
        return cls(
            stage=0,
            start_iteration=0,
            start_sample=0,
            weights=mixture.to_json(),
            domain_samples=dict.fromkeys(mixture, 0),
            source="initial",
            reason=reason,
        )

    @property
    def mixture(self) -> Mixture:
        """The mixture of the stage."""
        return Mixture(self.weights)

    @property
    def effective_domains(self) -> float:
        """exp(entropy) of the mixture."""
        return self.mixture.effective_domains

    def read_measured(self) -> Measured | None:
        """Return what the boundary before the stage measured; from its file, if it is in one.

        Raises:
            InputError: the file is missing, or is another one.
        """
        found = self.measured
        return found.read() if isinstance(found, BankFile) else found

    def objective(self) -> Objective | None:
        """Return what the solver minimised, as a function of weights in the row's order.

        None where nothing was solved, or where an earlier version wrote the row, or a part of the
        influence was not finite.
        """
        if self.rules is None or self.influence is None or self.influence.recorded:
            return None
        return self.rules.goal.objective(completed(self.influence, list(self.weights)))

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        parts = {
            name: None if (value := getattr(self, name)) is None else value.to_json()
            for name in _PARTS
        }
        influence = self.influence
        none = dict.fromkeys(("influence", "influence_se", "influence_df"))
        return {
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in _PLAIN},
            "weights": dict(self.weights),
            "effective_domains": self.effective_domains,
            **(none if influence is None else influence.to_json()),
            **parts,
            "bank": None if self.measured is None else self.measured.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], run_dir: Path = Path()) -> "StageRow":
        """Undo :meth:`to_json`; rows of earlier versions are read too.

        Args:
            run_dir: where the bank file lies that the row may name.

        Raises:
            InputError: a field is missing or cannot be read, or a later version wrote the row.
        """
        stage = data.get("stage")
        schema = data.get("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise InputError(
                f"stage {stage} of the ledger has schema {schema}, and this version reads up to "
                f"{SCHEMA}; use the version that wrote it, or a later one"
            )
        missing = [name for name in _NEEDED if data.get(name) is None]
        if missing:
            raise InputError(
                f"stage {stage} of the ledger has no {missing[0]}; this is not a ledger that "
                f"training wrote"
            )

        def part(kind: Any, name: str) -> Any:
            return kind.from_json(data[name]) if data.get(name) else None

        try:
            bank = data.get("bank")
            measured: Measured | BankFile | None = None
            if bank:
                measured = (
                    BankFile(bank["file"], bank["sha256"], run_dir)
                    if "file" in bank
                    else Measured.from_json(bank)
                )
            return cls(
                **{name: data[name] for name in _PLAIN if data.get(name) is not None},
                weights=dict(data["weights"]),
                influence=InfluenceMatrix.from_json(data) if data.get("influence") else None,
                measured=measured,
                **{name: part(kind, name) for name, kind in _PARTS.items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"stage {stage} of the ledger cannot be read: {type(error).__name__}: {error}"
            ) from error


_NEEDED = ("stage", "weights", "start_iteration", "start_sample")
_PARTS: dict[str, Any] = {
    "rules": Rules,
    "solution": MixtureSolution,
    "rank_stability": RankStability,
    "rollout": RolloutCost,
    "audit": Audit,
}
"""The fields that have a codec of their own."""

_PLAIN = [
    field.name
    for field in fields(StageRow)
    if field.name not in {"weights", "influence", "measured", *_PARTS}
]
"""The fields that are plain values themselves."""


class Ledger(Sequence[StageRow]):
    """The rows of a run, in the order of their stages.

    Args:
        rows: those there are.
        run_dir: the run's folder, if what is appended is to be written there as well: the row to
            its mixture.jsonl, and what was measured to a bank file.
    """

    def __init__(self, rows: Sequence[StageRow] = (), run_dir: str | Path | None = None) -> None:
        self._rows = list(rows)
        self._run_dir = None if run_dir is None else Path(run_dir)

    @classmethod
    def read(cls, run_dir: str | Path) -> "Ledger":
        """Return the ledger of a run, to be looked at or to be gone on with.

        A stage that was written twice, since the run was resumed from before it, counts as it was
        written last.

        Raises:
            InputError: the ledger is damaged, or has a row that this version cannot read.
        """
        path = Path(run_dir) / LEDGER
        latest = {row["stage"]: row for row in read_jsonl(path) if "stage" in row}
        try:
            rows = [StageRow.from_json(latest[stage], Path(run_dir)) for stage in sorted(latest)]
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return cls(rows, run_dir)

    def append(self, row: StageRow) -> None:
        """Add the row of a stage that has just begun, and write it if the ledger has a folder.

        Raises:
            OSError: it cannot be written; the ledger is then as it was.
        """
        if self._run_dir is not None:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            row = filed(row, self._run_dir)
            append_jsonl(self._run_dir / LEDGER, row.to_json())
        self._rows.append(row)

    def replace_last(self, row: StageRow) -> None:
        """Put `row` in the place of the last one, in memory alone."""
        self._rows[-1] = row

    def pop(self) -> StageRow:
        """Take the last row back, in memory alone."""
        return self._rows.pop()

    def to_json(self) -> list[dict[str, Any]]:
        """Return all rows as plain values; those with a bank file name it."""
        return [row.to_json() for row in self._rows]

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]], run_dir: Path = Path()) -> "Ledger":
        """Undo :meth:`to_json`.

        Args:
            run_dir: where the bank files lie. Nothing is written there.
        """
        return cls([StageRow.from_json(row, run_dir) for row in rows])

    @overload
    def __getitem__(self, index: int) -> StageRow: ...
    @overload
    def __getitem__(self, index: slice) -> "Ledger": ...
    def __getitem__(self, index: int | slice) -> "StageRow | Ledger":
        """A row, or the rows of a slice as a ledger that is written nowhere."""
        return Ledger(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __iter__(self) -> Iterator[StageRow]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Ledger({len(self)} stages)"


def filed(row: StageRow, run_dir: Path) -> StageRow:
    """Return the row with what it measured in a bank file of the run, and a reference to that.

    Raises:
        OSError: the file cannot be written.
    """
    if not isinstance(row.measured, Measured):
        return row
    return replace(row, measured=BankFile.written(run_dir, row.stage, row.measured))
