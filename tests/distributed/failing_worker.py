"""``python -m megatron_tikmix``; rank 1 fails at $FAIL_AT, the first time that it comes there.

$FAIL_AT: `step` (killed in iteration 6), or an error in `probe`, `solve` (rank 0 then) or `save`.
$FAILED: a file that is made as it fails.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tikmix.__main__ import main
from megatron_tikmix.decision.decide import Decider
from megatron_tikmix.measure.probe import InfluenceProbe
from megatron_tikmix.training import loop
from megatron_tikmix.training.checkpoint import Checkpointer

_at, _failed = os.environ["FAIL_AT"], Path(os.environ["FAILED"])
_steps = 0


def _failing(function: Callable[..., Any], rank: str) -> Callable[..., Any]:
    def failing(*arguments: Any, **options: Any) -> Any:
        if os.environ["RANK"] == rank and not _failed.exists():
            _failed.touch()
            raise RuntimeError(f"a fault in {_at}")
        return function(*arguments, **options)

    return failing


def _killed(*arguments: Any) -> Any:
    global _steps
    _steps += 1
    if os.environ["RANK"] == "1" and _steps == 6 and not _failed.exists():
        _failed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(*arguments)


_step = loop.train_step
if _at == "step":
    loop.train_step = _killed
elif _at == "probe":
    InfluenceProbe.add = _failing(InfluenceProbe.add, "1")  # type: ignore[method-assign]
elif _at == "solve":
    Decider.decide = _failing(Decider.decide, "0")  # type: ignore[method-assign]
elif _at == "save":
    Checkpointer._record = _failing(Checkpointer._record, "0")  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
