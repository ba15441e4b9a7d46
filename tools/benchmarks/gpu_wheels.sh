#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Download into gpu_wheels/ what gpu.sh needs on a machine without a network
# that has torch, torchvision, OpenCV, matplotlib, rich, einops, pytest: 5 MB.
#
#   bash tools/benchmarks/gpu_wheels.sh                  for Python 3.12
#   bash tools/benchmarks/gpu_wheels.sh einops rich      and these as well
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)"

# setuptools as mmengine 0.10 imports pkg_resources, which release 81 dropped.
packages=(
    mmengine==0.10.7 mmcv-lite==2.1.0 mmpretrain==1.2.0
    addict==2.4.0 termcolor yapf==0.43.0 platformdirs
    mat4py==0.6.0 model-index==0.1.11 modelindex==0.0.2 ordered-set
    importlib-metadata==8.7.0 zipp==3.23.0 markdown safetensors filelock
    'setuptools<81'
)
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: \
    --python-version 3.12 --dest "$root/gpu_wheels" "${packages[@]}" "$@"
du -ch "$root"/gpu_wheels/*.whl
