#!/usr/bin/env bash
# A Megatron command as one has it, and one argument more. One node of 8 GPUs; with a checkout of
# Megatron-LM on PYTHONPATH, put its pretrain_gpt.py in the place of this folder's.
#
#   examples/megatron_lm/train.sh
set -euo pipefail
here=$(dirname "$0")
torchrun --nproc-per-node "${GPUS:-8}" -m megatron_tikmix.hosts.megatron_lm "$here/pretrain_gpt.py" \
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 8192 --num-attention-heads 32 \
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope --bf16 \
    --micro-batch-size 4 --global-batch-size 512 --train-iters 100000 \
    --lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters 2000 --weight-decay 0.1 \
    --tokenizer-type NullTokenizer --vocab-size "${VOCAB_SIZE:-50256}" \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --log-interval 10 --eval-iters 0 --save "${SAVE:-runs/megatron_lm}" \
    --load "${SAVE:-runs/megatron_lm}" --save-interval 1000 \
    --tikmix-config "${TIKMIX:-$here/tikmix.yaml}" "$@"
