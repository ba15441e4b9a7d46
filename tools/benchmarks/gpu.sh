#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# All that only a GPU can tell, in one run of at most nine minutes.
#
#   bash tools/benchmarks/gpu.sh                    writes work_dirs/gpu/gpu.md
#   bash tools/benchmarks/gpu.sh --tiny             small, also on a CPU
#   bash tools/benchmarks/gpu.sh --help             all options
#
# It needs what the tests need, but no network: a machine with torch gets the
# rest by gpu_wheels.sh. Images to train on may lie in gpu_data/.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"
python="${PYTHON:-python3}"

scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
for wheel in "$root"/gpu_wheels/*.whl; do
    [[ -e $wheel ]] && "$python" -m zipfile -e "$wheel" "$scratch/wheels"
done

# Processes are forked from one that has imported torch and asked for GPUs,
# which must not start the driver there.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
export PYTHONPATH="$root:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}"
"$python" "$root/tools/benchmarks/gpu.py" --scratch "$scratch" "$@"
