"""``torchrun --nproc-per-node N -m megatron_tikmix CONFIG.yaml [--section.field value ...]``"""

import os
import sys
import time
import warnings

from megatron_tikmix.errors import InputError, TrainingError


def main(arguments: list[str]) -> int:
    """Run the command line; the exit code is 2 for bad input, which is told in one sentence."""
    _quieten_libraries()
    try:
        # Imported here: megatron-core takes seconds to load and warns while it does.
        from megatron_tikmix.config import load_config
        from megatron_tikmix.pretrain import pretrain

        config, resolved = load_config(arguments)
        pretrain(config, resolved)
    except InputError as error:
        _say(str(error))
        return 2
    except TrainingError as error:
        _say(str(error))
        return 1
    return 0


def _say(sentence: str) -> None:
    if os.environ.get("RANK", "0") != "0":
        # torchrun ends the job when its first rank exits: leave rank 0 the time to speak. Who
        # is still there afterwards is alone with the error, and says it.
        time.sleep(10)
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def _quieten_libraries() -> None:
    """Keep megatron-core's notes on optional packages off the terminal."""
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\..*")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
