#!/usr/bin/env bash
# Train by the deepspeed launcher:  bash launch/deepspeed.sh biogpt data.shards=shards
# Several machines: HOSTFILE=launch/hostfile.example (yours), with ssh between them.
set -euo pipefail
hosts=()
if [[ -n ${HOSTFILE:-} ]]; then hosts=(--hostfile "$HOSTFILE"); fi
export PYTHONSAFEPATH=1  # a data/ or model/ in the working folder must not hide ours
exec deepspeed "${hosts[@]}" ${RANKS_PER_NODE:+--num_gpus "$RANKS_PER_NODE"} --module pretrain.train "$@"
