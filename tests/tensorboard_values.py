"""What a run's event files must hold, worked out from its JSONL files, and what they do hold."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Row = Mapping[str, Any]
Scalars = dict[tuple[str, int], float]
"""By tag and iteration."""

AUDITED = ("predicted", "difference", "low", "high")
DOCUMENT = Path(__file__).parent.parent / "docs" / "monitoring.md"


def read_back(log_dir: str | Path) -> tuple[Scalars, dict[int, str]]:
    """Every scalar of the event files, and the decisions in words by iteration."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    found = [(tag, event) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]
    scalars = {(tag, event.step): event.value for tag, event in found}
    assert len(scalars) == len(found), "a value was written twice"
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("mixture/decision/text_summary")
    }
    return scalars, texts


def expected_scalars(ledger: Sequence[Row], metrics: Sequence[Row], length: int) -> Scalars:
    """Everything that the rows of both files say, at samples of `length` tokens."""
    expected: Scalars = {}
    for former, row in zip([None, *ledger], ledger, strict=False):
        step = row["start_iteration"]
        for tag, value in _of_stage(former, row, length):
            expected[tag, step] = value
    for row in metrics:
        begun = [stage for stage in ledger if stage["start_sample"] < row["consumed_samples"]][-1]
        if "task_loss" not in row:  # in the middle of a stage
            for name, weight in begun["weights"].items():
                expected[f"mixture/weight/{name}", row["iteration"]] = weight
        for tag, value in _of_step(begun, row, length):
            expected[tag, row["iteration"]] = value
    return {key: value for key, value in expected.items() if value is not None}


def assert_same(scalars: Scalars, expected: Scalars) -> None:
    """Nothing is missing, nothing is there besides, and every value is equal, as float32."""
    assert scalars.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(scalars[key], np.float32(value), rtol=2e-7, err_msg=str(key))


def undocumented(tags: Sequence[str]) -> tuple[set[str], set[str]]:
    """Tags that docs/monitoring.md does not list; and what it lists of which no tag is there."""
    listed = set(documented_tags())
    patterns = {tag: re.compile(re.sub(r"<\w+>", ".+", re.escape(tag))) for tag in listed}
    unlisted = {tag for tag in tags if not any(p.fullmatch(tag) for p in patterns.values())}
    unseen = {name for name, p in patterns.items() if not any(p.fullmatch(tag) for tag in tags)}
    return unlisted, unseen


def documented_tags() -> Iterator[str]:
    """The tags in the first column of the table of tags, all that are between backticks."""
    _, _, section = DOCUMENT.read_text(encoding="utf-8").partition("\n## TensorBoard\n")
    section, _, _ = section.partition("\n## ")
    rows = re.findall(r"^\| (`.*`) \|", section, re.MULTILINE)
    for row in rows:
        yield from re.findall(r"`([^`]+)`", row)


def _of_stage(former: Row | None, row: Row, length: int) -> Iterator[tuple[str, float | None]]:
    yield from _named("mixture/weight", row["weights"])
    yield from _drawn(row, length)
    yield from _losses(row)
    for field in ("effective_domains", "total_variation", "total_variation_noise"):
        yield f"mixture/{field}", row[field]
    for task, values in (row["influence"] or {}).items():
        errors = row["influence_se"][task]
        yield from _named(f"influence/{task}", values)
        yield from _named(f"influence_se/{task}", errors)
        for name, value in values.items():
            if value is not None and errors.get(name) is not None:
                yield f"influence_low/{task}/{name}", value - errors[name]
                yield f"influence_high/{task}/{name}", value + errors[name]
    for field, values in (row["rank_stability"] or {}).items():
        yield from _named(f"rank_stability/{field}", values)
    if row["solution"]:
        yield from _of_solution(row["solution"])
    for field in AUDITED if row["audit"] else ():
        yield f"audit/{field}", row["audit"]["overall"][field]
        for task, found in row["audit"]["tasks"].items():
            yield f"audit/{field}/{task}", found[field]
    if former is not None and row["probe_tokens"]:
        trained = (row["start_sample"] - former["start_sample"]) * length
        probe, more = row["probe_tokens"], [row["rollout"], row["audit"]]
        rest = sum(each["trained_tokens"] + each["evaluated_tokens"] / 3 for each in more if each)
        yield "probe/share_of_compute", probe / (probe + trained)
        yield "decision/share_of_compute", (probe + rest) / (probe + rest + trained)
        yield "probe/seconds", row["probe_seconds"]
        seconds = [each["seconds"] for each in more if each]
        yield "decision/seconds", row["probe_seconds"] + sum(seconds)


def _of_solution(solution: Row) -> Iterator[tuple[str, float | None]]:
    before, after = solution["gain_before"], solution["gain_after"]
    yield from _named("predicted_gain", {task: after[task] - before[task] for task in after})
    yield "solver/objective", solution["objective"]
    yield "solver/seconds", solution["solve_seconds"]
    certificate = solution["certificate"] or dict.fromkeys(("gap", "lower_bound", "violation"))
    yield "solver/duality_gap", certificate["gap"]
    yield "solver/lower_bound", certificate["lower_bound"]
    yield "solver/violation", certificate["violation"]


def _of_step(stage: Row, row: Row, length: int) -> Iterator[tuple[str, float | None]]:
    yield "lm loss", row["lm_loss"]
    yield "learning-rate", row["learning_rate"]
    yield "grad-norm", row["grad_norm"]
    yield "tokens-per-second", row["tokens_per_second"]
    yield "mem-max-allocated-bytes", row["memory_bytes"]
    yield "skipped-iterations", row["skipped_iterations"]
    yield "loss-spikes", row["loss_spikes"]
    yield from _named("domain_loss", row["domain_loss"])
    since = {n: count - stage["domain_samples"][n] for n, count in row["domain_samples"].items()}
    total = sum(since.values())
    assert total == row["consumed_samples"] - stage["start_sample"]
    yield from _named("mixture/realised", {name: count / total for name, count in since.items()})
    if "task_loss" in row:
        yield from _drawn(row, length)
        yield from _losses(row)
        yield from _named("validation/bits_per_byte", row["task_bits_per_byte"])


def _drawn(row: Row, length: int) -> Iterator[tuple[str, float | None]]:
    tokens = {name: count * length for name, count in row["domain_samples"].items()}
    yield from _named("mixture/tokens", tokens)
    yield from _named("mixture/epochs", row["domain_epochs"])


def _losses(row: Row) -> Iterator[tuple[str, float | None]]:
    yield from _named("validation/loss", row["task_loss"])
    losses = list(row["task_loss"].values())
    if None not in losses:
        yield "validation/mean_loss", math.fsum(losses) / len(losses)


def _named(prefix: str, values: Mapping[str, float | None]) -> Iterator[tuple[str, float | None]]:
    return ((f"{prefix}/{name}", value) for name, value in values.items())
