"""Two ranks, on one card where there is one, against one rank, in both modes of a probe."""

import os
import shutil
from pathlib import Path
from typing import Any

from gpu_first_parts import runs, versions
from gpu_first_parts.notes import Notes

# isort: split
import numpy as np
from forked_ranks import free_port

from megatron_tikmix.influence.bank import SubBatchBank
from tests.conftest import read_rows

LOSS, INFLUENCE = 1e-5, 1e-4
"""Relative differences that are allowed; of the row's largest entry."""

# NCCL refuses two ranks on one card of a host, and so is told of two hosts that meet on loopback.
TWO_HOSTS = {
    "NCCL_SOCKET_IFNAME": "lo",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1",
    "NCCL_IB_DISABLE": "1",
}


def measure(notes: Notes, device: str, work: Path) -> None:
    versions.note_machine(notes, device)
    # Without dropout, whose random streams differ between layouts.
    plain = {"model.hidden_dropout": 0.0, "model.attention_dropout": 0.0, "remix.mode": "advise"}
    expected = _trained(work, "pair-one", plain, {0: {}})
    for mode in ("sharded", "replicated"):
        if mode in notes:
            continue
        overlap = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
        fields = plain | overlap | {"probe.data_parallel_mode": mode}
        losses, influence = _trained(work, f"pair-{mode}", fields, _two(device))
        pairs = zip(expected[0], losses, strict=True)
        loss = max(abs(a - b) / a for a, b in pairs)
        differences = []
        for one, two in zip(expected[1], influence, strict=True):
            differences.append((np.abs(one - two) / np.abs(one).max(axis=1, keepdims=True)).max())
        largest = float(max(differences))
        notes.add(
            mode,
            {"loss, relative": loss, "influence, of a row's largest": largest},
            kept=loss <= LOSS and largest <= INFLUENCE,
        )


def _two(device: str) -> dict[int, dict[str, str]]:
    """The environment of each of two ranks."""
    port = str(free_port())
    ranks = {}
    for rank in range(2):
        card = rank if device == "cpu" else 0
        ranks[rank] = {
            "RANK": str(rank),
            "LOCAL_RANK": str(card),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        if device == "cuda":
            ranks[rank] |= TWO_HOSTS | {"NCCL_HOSTID": f"{os.uname().nodename}-{rank}"}
    return ranks


def _trained(
    work: Path, name: str, fields: dict[str, Any], ranks: dict[int, dict[str, str]]
) -> tuple[list[float], list[np.ndarray]]:
    """The losses of a run, and the influence of each of its boundaries, (V, D)."""
    shutil.rmtree(work / "runs" / name, ignore_errors=True)
    settings = runs.tiny(work, name, fields)
    runs.train(settings, ranks)
    losses = [row["lm_loss"] for row in runs.rows_of(settings)]
    banks = [
        SubBatchBank.from_json(row["bank"])
        for row in read_rows(settings["run_dir"], "mixture.jsonl")[1:]
    ]
    return losses, [bank.influence_matrix().values_VD for bank in banks]
