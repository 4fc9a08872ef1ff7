#!/usr/bin/env bash
# Train by torchrun on this machine, one rank for each GPU:  bash launch/torchrun.sh biogpt data.shards=shards
# Several machines: run it on each with NNODES, NODE_RANK and MASTER_ADDR (the first machine) set.
set -euo pipefail
ranks=${RANKS_PER_NODE:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
export PYTHONSAFEPATH=1  # a data/ or model/ in the working folder must not hide ours
exec torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$ranks" \
    --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" -m pretrain.train "$@"
