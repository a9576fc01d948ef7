"""Parameters that are gathered late, by forward hooks of megatron-core."""

from pathlib import Path
from typing import Any

from megatron_tikmix.megatron.step import gathered_parameters
from tests.conftest import overridden
from tests.one_rank import one_rank


def test_parameters_are_gathered_only_where_they_are_late(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Megatron's loop switches the hooks off for a while, after a skipped first step for one."""
    overlapped = {"ddp.overlap_grad_reduce": True, "ddp.overlap_param_gather": True}
    with one_rank(overridden(settings, overlapped), tmp_path) as run:
        (chunk,) = run.forward_backward.model
        modules = len(chunk.remove_forward_pre_hook_handles)
        with gathered_parameters([chunk]):
            assert not chunk.remove_forward_pre_hook_handles
        assert len(chunk.remove_forward_pre_hook_handles) == modules > 0
        chunk.disable_forward_pre_hook()
        with gathered_parameters([chunk]):
            pass
        assert not chunk.remove_forward_pre_hook_handles
