"""``torchrun --nproc-per-node N -m megatron_tikmix CONFIG.yaml [--section.field value ...]``"""

import sys

from megatron_tikmix.errors import InputError, TrainingError
from megatron_tikmix.log import configure_logging, print_error
from megatron_tikmix.megatron.apex import check_apex


def main(arguments: list[str]) -> int:
    """Run the command line; the exit code is 2 for bad input, which is told in one sentence."""
    configure_logging()
    try:
        check_apex()
        # Imported here: megatron-core takes seconds to load and warns while it does.
        from megatron_tikmix.config import load_config
        from megatron_tikmix.training.build import pretrain

        config, resolved = load_config(arguments)
        pretrain(config, resolved)
    except InputError as error:
        print_error(str(error))
        return 2
    except TrainingError as error:
        print_error(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
