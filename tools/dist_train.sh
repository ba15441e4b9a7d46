#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Train on several GPUs of this machine, or of several machines:
#   bash tools/dist_train.sh CONFIG GPUS [any flag of tools/train.py]
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and
# PORT. To outlive the loss of one of them set RDZV_ENDPOINT=HOST:PORT instead
# of the last two, MAX_RESTARTS, and the flag --resume (docs/reliability.md).
# Without GPUs it starts as many CPU processes, which talk over gloo.
set -euo pipefail

if (($# < 2)); then
    echo "usage: $0 CONFIG GPUS [flags of tools/train.py]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

# A restart runs the same command again.
restarts=${MAX_RESTARTS:-${PET_MAX_RESTARTS:-0}}
endpoint=${RDZV_ENDPOINT:-${PET_RDZV_ENDPOINT:-}}
if [[ ($restarts != 0 || -n $endpoint) && " $* -" != *" --resume -"* ]]; then
    echo "$0: MAX_RESTARTS or RDZV_ENDPOINT is set, and so the run may be" \
        "started again by itself. Give --resume, without a file, for it to" \
        "go on from its last checkpoint" >&2
    exit 2
fi

exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_run.sh" train.py "$gpus" \
    "$config" --launcher pytorch "$@"
