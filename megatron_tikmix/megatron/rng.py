"""The random streams of this rank: torch's, CUDA's, and megatron-core's tracked ones."""

import hashlib
from typing import Any

import torch
from megatron.core import tensor_parallel

from megatron_tikmix.seeds import derived_seed


def rng_state() -> dict[str, Any]:
    """Return copies of the states of all streams, for :func:`set_rng_state`."""
    tracked = tensor_parallel.get_cuda_rng_tracker().get_states()
    state = {
        "cpu": torch.get_rng_state(),
        "tracker": {name: _copy(stream) for name, stream in tracked.items()},
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set all streams to `state`, which stays unchanged."""
    torch.set_rng_state(state["cpu"])
    tensor_parallel.get_cuda_rng_tracker().set_states(
        {name: _copy(stream) for name, stream in state["tracker"].items()}
    )
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def same_rng_state(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether all streams of two states are at the same place."""
    ones, others = (
        {"cpu": s["cpu"], "cuda": s.get("cuda", s["cpu"]), **s["tracker"]} for s in (one, other)
    )
    return ones.keys() == others.keys() and all(
        torch.equal(_bytes(stream), _bytes(others[name])) for name, stream in ones.items()
    )


def _bytes(stream: Any) -> torch.Tensor:
    state: torch.Tensor = stream.get_state() if isinstance(stream, torch.Generator) else stream
    return state


def reseeded(state: dict[str, Any], seed: int) -> dict[str, Any]:
    """Return new states of all streams, derived from `seed` and the old states.

    Streams that were equal on several ranks (data-parallel replicas, say) stay equal, and those
    that differed stay different, whatever the layout.
    """
    result = {"cpu": _fresh(state["cpu"], seed, "cpu"), "tracker": {}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, stream in state["tracker"].items():
        result["tracker"][name] = _fresh(stream, seed, device)
    if "cuda" in state:
        result["cuda"] = _fresh(state["cuda"], seed, "cuda")
    return result


def _fresh(stream: Any, seed: int, device: str) -> Any:
    if isinstance(stream, torch.Generator):  # tracked so for CUDA graphs
        return _copy(stream).manual_seed(_seed(stream.get_state(), seed))
    return torch.Generator(device).manual_seed(_seed(stream, seed)).get_state()


def _seed(state: torch.Tensor, seed: int) -> int:
    return derived_seed(seed, hashlib.sha256(state.cpu().numpy().tobytes()).hexdigest())


def _copy(stream: Any) -> Any:
    return stream.clone_state() if isinstance(stream, torch.Generator) else stream.clone()
