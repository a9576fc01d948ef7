#!/usr/bin/env bash
# One machine without a GPU: two data-parallel ranks on its cores.
#
#   examples/laptop.sh [CONFIG.yaml] [--section.field value ...]
#
# Once before, in the repository: make quickstart, which installs all and makes the data of
# examples/quickstart.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/torchrun ] && PATH="$PWD/.venv/bin:$PATH"

config=${1:-examples/quickstart.yaml}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # with several ranks on few cores, the fastest

exec torchrun --standalone --nproc-per-node "${RANKS:-2}" -m megatron_tikmix "$config" "${@:2}"
