"""Small layouts on a device that has shapes and no numbers: everything a run does, on every rank.

What an accelerator would refuse or wait for is found here without one: tensors of two devices in
one operation, collectives that not every rank of a group reaches, host waits.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import overridden

TP = "model.tensor_model_parallel_size"
PP = "model.pipeline_model_parallel_size"
SWIGLU = {
    "model.gated_linear_unit": True,
    "model.activation_func": "torch.nn.functional.silu",
    "model.add_bias_linear": False,
}
RECOMPUTED = {
    "model.recompute_granularity": "full",
    "model.recompute_method": "uniform",
    "model.recompute_num_layers": 1,
}
BF16 = {
    "model.bf16": True,
    "ddp.overlap_grad_reduce": True,
    "ddp.overlap_param_gather": True,
}
GROUPS = {
    "probe.data_parallel_mode": "replicated",
    "probe.task_group_size": 1,
    "probe.gradient_dtype": "bf16",
}
ROLLOUTS = {"remix.policy": "tikmix_m", "remix.candidates": 16, "rollout.iters": 1}

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "data parallel, bf16 overlapped": (2, BF16),
    "tensor parallel, sequence parallel": (2, {TP: 2, "model.sequence_parallel": True}),
    "interleaved pipeline, joint, precision": (
        2,
        {
            PP: 2,
            "model.virtual_pipeline_model_parallel_size": 2,
            "model.num_layers": 4,
            "remix.influence": "joint",
            "probe.precision": 0.2,
            "probe.max_tokens": 20000,
        },
    ),
    "replicated in groups, squared gradients, tikmix_m": (
        2,
        GROUPS | ROLLOUTS | {"probe.curvature": "squared_gradients"},
    ),
    "documents, learned positions": (
        1,
        {
            "data.reset_attention_mask": True,
            "data.reset_position_ids": True,
            "data.eod_mask_loss": True,
            "model.position_embedding_type": "learned_absolute",
            "audit.enabled": True,
            "audit.iters": 1,
        },
    ),
    "recomputed, dropout, SwiGLU, grouped queries, identity": (
        1,
        SWIGLU
        | RECOMPUTED
        | {
            "model.hidden_dropout": 0.1,
            "model.attention_dropout": 0.1,
            "model.num_query_groups": 2,
            "model.qk_layernorm": True,
            "model.normalization": "RMSNorm",
            "model.share_embeddings_and_output_weights": False,
            "probe.curvature": "identity",
            "model.attention_backend": "flash",
        },
    ),
}
SLOW = {
    "two by two by two": (8, {TP: 2, PP: 2}),
    "audit": (2, {"audit.enabled": True, "audit.iters": 1}),
    "pipeline": (2, {PP: 2}),
    "selective": (1, {"model.recompute_granularity": "selective"}),
    "fusions": (
        1,
        SWIGLU | {"model.bias_activation_fusion": True, "model.bias_dropout_fusion": True},
    ),
}
PLANTS = {
    "a CPU tensor in the loss": 1,
    "a CPU tensor in the probe's sums": 1,
    "a CPU tensor in a checkpoint": 1,
    "a collective that one rank skips": 2,
    "a host wait in a step": 1,
}

OWN_WAITS = {"finalize_model_grads.py": 2, "clip_grads.py": 1}
"""Where megatron-core waits in a step, and how often at most: for the tokens of a batch, once a
model chunk; for the norm of the gradient."""


@pytest.fixture(scope="module")
def base(corpus: Path) -> dict[str, Any]:
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "make_vocab_size_divisible_by": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "data": {
            "manifest": str(corpus),
            "domains": ["low", "high"],
            "sequence_length": 32,
            "initial_mixture": "uniform",
        },
        "tasks": {"low": {"domain": "low"}, "high": {"domain": "high"}},
        "train": {
            "train_iters": 12,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "log_interval": 100,
        },
        "optimizer": {"lr": 2e-3, "adam_beta2": 0.0},
        "remix": {"interval_samples": 24, "influence": "marginal"},
        "probe": {"sub_batch_samples": 4, "task_samples": 4, "max_overhead": None},
        "evaluate": {"task_samples": 4},
    }


def rehearsed(
    base: dict[str, Any], cases: dict[str, dict[str, Any]], folder: Path
) -> dict[str, dict[str, Any]]:
    """What the ranks of each case saw, by rank; all cases in one process."""
    paths = [folder / name for name in ("settings.yaml", "cases.yaml", "result.json")]
    paths[0].write_text(yaml.safe_dump(base))
    paths[1].write_text(yaml.safe_dump(cases))
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.stand_in_cases"]
    result = subprocess.run(
        [*command, *map(str, paths)], capture_output=True, text=True, timeout=580
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found: dict[str, dict[str, Any]] = json.loads(paths[2].read_text())
    return found


def check(ranks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What an accelerator, or a job of several ranks, would have stumbled over."""
    for rank, seen in ranks.items():
        for error in seen["errors"]:
            yield f"rank {rank}: {error}"
        if "waits" not in seen:
            return
        for phase, place, count in seen["misplaced"]:
            yield f"rank {rank}, {phase}: {count} times tensors of the host at {place}"
        for name in seen["misplaced state"] or ():
            yield f"rank {rank}: {name} of a checkpoint is on the host"
        for phase, place, count in seen["waits"]:
            file = place.split("/")[-1].split(":")[0]
            if phase == "step" and count > OWN_WAITS.get(file, 0):
                yield f"rank {rank}: {count} host waits in a step at {place}"
        for phase, kind, members, _, on_host in seen["collectives"]:
            if phase == "step" and on_host:
                yield f"rank {rank}: {kind} on the host in a step, of {members}"
    yield from unmatched(ranks)


def unmatched(ranks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Groups whose ranks make other collectives than each other; messages that nobody receives."""
    by_group: dict[tuple[int, ...], dict[str, list[Any]]] = {}
    messages: Counter[tuple[int, int, int]] = Counter()
    for rank, seen in ranks.items():
        for _, kind, members, nbytes, on_host in seen["collectives"]:
            if kind == "send":
                messages[int(rank), members[0], nbytes] += 1
            elif kind.startswith("recv"):
                messages[members[0], int(rank), nbytes] -= 1
            else:
                made = by_group.setdefault(tuple(members), {})
                made.setdefault(rank, []).append((kind, on_host))
    for members, made in by_group.items():
        first = made.get(str(members[0]))
        for member in members:
            if made.get(str(member)) != first:
                yield f"ranks {members[0]} and {member} differ in the collectives of {members}"
    for (sender, receiver, nbytes), count in messages.items():
        if count:
            yield f"{count} messages of {nbytes} bytes from {sender} to {receiver} are not received"


@pytest.fixture(scope="module")
def seen(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of the ordinary suite, and what is planted, in one process."""
    cases: dict[str, dict[str, Any]] = {
        name: {"world_size": world, "settings": settings}
        for name, (world, settings) in CASES.items()
    }
    cases |= {plant: {"world_size": world, "plant": plant} for plant, world in PLANTS.items()}
    return rehearsed(base, cases, tmp_path_factory.mktemp("stand_in"))


@pytest.mark.parametrize("case", CASES)
def test_nothing_that_an_accelerator_would_stumble_over(case: str, seen: dict[str, Any]) -> None:
    assert list(check(seen[case])) == []
    assert seen[case]["0"]["source"] in ("kept", "tikmix_d", "tikmix_m")


@pytest.mark.parametrize("case", CASES)
def test_a_probe_waits_no_more_the_more_sub_batches_it_has(case: str, seen: dict[str, Any]) -> None:
    """16 sub-batches and more are measured at a boundary; our own waits are sums over ranks, and
    rollouts read their losses."""
    for ranks in seen[case].values():
        own = {
            place: count
            for phase, place, count in ranks["waits"]
            if phase == "boundary" and place.startswith("megatron_tikmix/")
        }
        sums = [count for place, count in own.items() if "/collectives.py" in place]
        others = [p for p in own if "/collectives.py" not in p and "/rollouts.py" not in p]
        assert not others
        if "tikmix_m" not in case and "documents" not in case:  # without rollouts
            assert sum(sums) < 16


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_found(plant: str, seen: dict[str, Any]) -> None:
    words = {
        "a CPU tensor in the loss": "device",
        "a CPU tensor in the probe's sums": "device",
        "a CPU tensor in a checkpoint": "of a checkpoint is on the host",
        "a collective that one rank skips": "differ in the collectives of (0, 1)",
        "a host wait in a step": "host waits in a step at",
    }[plant]
    assert any(words in problem for problem in check(seen[plant]))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_further_layouts(case: str, base: dict[str, Any], tmp_path: Path) -> None:
    world, settings = SLOW[case]
    cases = {case: {"world_size": world, "settings": settings}}
    found = rehearsed(overridden(base, {}), cases, tmp_path)
    assert list(check(found[case])) == []
