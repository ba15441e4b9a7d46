#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Test under Slurm:
#   GPUS=8 bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT \
#       [any flag of tools/test.py]
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS are taken from the
# environment.
set -euo pipefail

if (($# < 4)); then
    echo "usage: $0 PARTITION JOB_NAME CONFIG CHECKPOINT" \
        "[flags of tools/test.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
checkpoint=$4
shift 4

exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm_run.sh" test.py \
    "$partition" "$job_name" "$config" "$checkpoint" --launcher slurm "$@"
