"""Rollouts are undone: all that training goes on from is what it was, bit for bit."""

import shutil
from pathlib import Path

from gpu_first_parts import runs, versions
from gpu_first_parts.notes import Notes

# isort: split
import torch

from megatron_tikmix.measure.snapshot import TrainingSnapshot
from megatron_tikmix.training.loop import train_interval
from tests.rollout_runs import candidates, losses_of_steps, rollouts_of, settled, state_digests

EMPTIED = {"gradient buffers", "gradients", "modes"}
"""Kinds that a step leaves as they are."""


def measure(notes: Notes, device: str, work: Path) -> None:
    versions.note_machine(notes, device)
    for kind, bf16 in (("float32", False), ("bf16", True)):
        name = f"snapshot-{kind}"
        shutil.rmtree(work / "runs" / name, ignore_errors=True)
        settings = runs.tiny(work, name, {"model.bf16": bf16, "train.train_iters": 40})
        with runs.built(settings) as (run, _):
            train_interval(run, until=4)
            before = settled(run)
            model = run.forward_backward.model
            snapshot = TrainingSnapshot(model, run.optimizer, run.scheduler)
            losses_of_steps(run, 3)
            moved = settled(run)
            snapshot.restore()
            restored = state_digests(run)
            snapshot.release()
            weights_ND = candidates(run.domains, (1, 1, 1, 1), (8, 1, 1, 1))
            outcomes = rollouts_of(run).measure(weights_ND, seed=7, iters=3)
            after = state_digests(run)
            unmoved = [each for each in before if moved[each] == before[each]]
            _note(notes, f"{kind}: a snapshot restored", before, restored, unmoved)
            _note(notes, f"{kind}: rollouts of two mixtures", before, after, unmoved)
            finite = bool(torch.isfinite(torch.as_tensor(outcomes.drops_RNV)).all())
            notes.add(f"{kind}: drops of the losses", {"finite": finite}, kept=finite)


def _note(
    notes: Notes, step: str, before: dict[str, str], after: dict[str, str], unmoved: list[str]
) -> None:
    other = [kind for kind in before if after[kind] != before[kind]]
    # What no step moves proves nothing by being there again.
    still = sorted(set(unmoved) - EMPTIED)
    notes.add(
        step,
        {"kinds of state": len(before), "not as before": other, "not moved by steps": still},
        kept=not other and not still,
    )
