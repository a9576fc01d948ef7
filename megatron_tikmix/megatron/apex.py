"""Checks that an installed package `apex` is NVIDIA's, as megatron-core assumes.

This module does not import megatron-core, which would import `apex`.
"""

import importlib.util
import sys
from pathlib import Path

from megatron_tikmix.errors import InputError


def check_apex() -> None:
    """Refuse an `apex` that megatron-core cannot use, before megatron-core imports it.

    megatron-core assumes that any importable `apex` is NVIDIA's, and otherwise fails while the
    model is built, or at once with PyPI's `apex`, an unrelated project of Python 2.

    Raises:
        InputError: names the package, and the remedy.
    """
    folders = _folders("apex")
    if folders is None:
        return
    where = folders[0] if folders else "this environment"
    if not any(Path(folder, "optimizers", "fused_adam.py").is_file() for folder in folders):
        raise InputError(
            f"the package apex in {where} is not NVIDIA's Apex (on PyPI that name belongs to an "
            f"unrelated project), and megatron-core would take it for that; pip uninstall apex, or "
            f"start where there is no folder apex"
        )
    if _folders("amp_C") is None:
        raise InputError(
            f"NVIDIA's Apex in {where} was built without its CUDA extensions (there is no amp_C), "
            f"and megatron-core would fail with it; build it with them, or pip uninstall apex"
        )


def _folders(name: str) -> list[str] | None:
    """Return the folders of a top-level package; empty for a plain module, None if not found."""
    module = sys.modules.get(name)
    if module is not None:
        return list(getattr(module, "__path__", []))
    spec = importlib.util.find_spec(name)
    return None if spec is None else list(spec.submodule_search_locations or [])
