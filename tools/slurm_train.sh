#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Train under Slurm:
#   GPUS=8 bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [WORK_DIR] \
#       [any flag of tools/train.py]
# GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS are taken from the
# environment.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 PARTITION JOB_NAME CONFIG [WORK_DIR]" \
        "[flags of tools/train.py]" >&2
    exit 2
fi
partition=$1
job_name=$2
config=$3
shift 3
work_dir=()
if (($# > 0)) && [[ $1 != -* ]]; then
    work_dir=(--work-dir "$1")
    shift
fi

exec bash "$(dirname "${BASH_SOURCE[0]}")/slurm_run.sh" train.py \
    "$partition" "$job_name" "$config" "${work_dir[@]}" --launcher slurm "$@"
