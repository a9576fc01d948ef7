"""``python -m megatron_tikmix.cli COMMAND ...``, the same as ``tikmix COMMAND ...``.

``torchrun -m megatron_tikmix.cli propose ...`` starts it on several ranks.
"""

import sys

from megatron_tikmix.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
