#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# What dist_train.sh and dist_test.sh share; use those.
#   bash tools/dist_run.sh SCRIPT PROCESSES ARGUMENTS...
set -euo pipefail

script=$1
processes=$2
shift 2

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$processes" \
    "$root/tools/$script" "$@"
