#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# What slurm_train.sh and slurm_test.sh share; use those.
#   bash tools/slurm_run.sh SCRIPT PARTITION JOB_NAME ARGUMENTS...
set -euo pipefail

script=$1
partition=$2
job_name=$3
shift 3
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# shellcheck disable=SC2086  # SRUN_ARGS is a list of words
exec srun -p "$partition" \
    --job-name="$job_name" \
    --gres="gpu:$gpus_per_node" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${SRUN_ARGS:-} \
    "${PYTHON:-python}" -u "$root/tools/$script" "$@"
