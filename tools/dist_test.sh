#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Test on several GPUs of this machine, or of several machines:
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [any flag of tools/test.py]
# On several machines run it on each, with NNODES, NODE_RANK, MASTER_ADDR and
# PORT.
# Without GPUs it starts as many CPU processes, which talk over gloo.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 CONFIG CHECKPOINT GPUS [flags of tools/test.py]" >&2
    exit 2
fi
config=$1
checkpoint=$2
gpus=$3
shift 3

exec bash "$(dirname "${BASH_SOURCE[0]}")/dist_run.sh" test.py "$gpus" \
    "$config" "$checkpoint" --launcher pytorch "$@"
