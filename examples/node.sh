#!/usr/bin/env bash
# One node of GPUs (8, or as many as GPUS says).
#
#   examples/node.sh CONFIG.yaml [--section.field value ...]
#
# Started again it goes on from the newest checkpoint in the run's run_dir. To have it stop early
# with a checkpoint, send SIGTERM to its ranks: pkill -TERM -f -- '-u -m megatron_tikmix'
set -euo pipefail
config=${1:?usage: examples/node.sh CONFIG.yaml [--section.field value ...]}
gpus=${GPUS:-8}

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Megatron wants it for tensor parallelism: what is launched first runs first.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# What cannot run, or does not fit, is told here, in seconds.
WORLD_SIZE=$gpus python -m megatron_tikmix "$config" "${@:2}" --dry_run true

exec torchrun --standalone --nproc-per-node "$gpus" -m megatron_tikmix "$config" "${@:2}"
