#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Train on several GPUs of this machine, or of several machines:
#   bash tools/dist_train.sh CONFIG GPUS [any flag of tools/train.py]
# On several machines run it on each, with NNODES, NODE_RANK and MASTER_ADDR.
# Without GPUs it starts as many CPU processes, which talk over gloo.
set -euo pipefail

if (($# < 2)); then
    echo "usage: $0 CONFIG GPUS [flags of tools/train.py]" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2

exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_run.sh" train.py "$gpus" \
    "$config" --launcher pytorch "$@"
