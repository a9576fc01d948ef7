#!/usr/bin/env bash
# The first run on a GPU: benchmarks/gpu_first.sh pack, then benchmarks/gpu_first.sh [PIECE ...] there.
# DEVICE=cpu rehearses it; $OUT is where the report goes; --help says the rest.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
case "${1:-}" in
  pack) command=pack; shift ;;
  *) command=run ;;
esac
exec "$PYTHON" benchmarks/gpu_first.py "$command" "$@"
