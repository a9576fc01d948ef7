"""Run ``tikmix inspect`` from a checkout."""

import sys

from megatron_tikmix.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
