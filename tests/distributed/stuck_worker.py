"""``python -m megatron_tikmix``; rank 1 gets stuck in iteration 3."""

import os
import sys
import time
from typing import Any

from megatron_tikmix.__main__ import main
from megatron_tikmix.training import loop

_step = loop.train_step
_steps = 0


def _stuck(*arguments: Any) -> Any:
    global _steps
    _steps += 1
    if os.environ["RANK"] == "1" and _steps == 3:
        time.sleep(300)
    return _step(*arguments)


loop.train_step = _stuck

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
