"""``python -m megatron_tikmix``; rank 1 gets $STOP_SIGNAL in the step that follows $STOP_AFTER.

So do its loader's workers, from another process: schedulers signal all those of a job.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from typing import Any

from megatron_tikmix.__main__ import main
from megatron_tikmix.training import loop

_step = loop.train_step
_number = getattr(signal, os.environ["STOP_SIGNAL"])
_left = int(os.environ["STOP_AFTER"])


def _interrupted(*arguments: Any) -> Any:
    global _left
    if os.environ["RANK"] == "1":
        if _left == 0:
            processes = [*multiprocessing.active_children(), multiprocessing.current_process()]
            subprocess.run(["kill", f"-{_number}", *(str(p.pid) for p in processes)], check=True)
            time.sleep(0.5)
        _left -= 1
    return _step(*arguments)


loop.train_step = _interrupted

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
