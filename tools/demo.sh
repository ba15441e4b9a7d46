#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Sets up what is missing, then shows the method at work, without downloads:
# photographs inside the scikit-image, scikit-learn and matplotlib wheels are
# cut into tiles, DenseCL trains a small ResNet-18 on them (about three minutes
# on two CPU cores), and a linear segmentation of labelled scenes takes its
# weights (about two), beside random ones. Ctrl-C stops it; running it
# again goes on from where it was.
set -euo pipefail
# Sets `root` and `python`.
# shellcheck source=tools/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"

config=configs/demo/densecl_r18w16_1xb64-coslr-40e_tiles.py
work_dir=work_dirs/demo
weights="$work_dir/epoch_40.pth"

echo '== Cutting photographs into tiles, and composing labelled scenes'
"$python" tools/demo/make_tiles.py data/demo_tiles
"$python" tools/demo/make_scenes.py data/demo_scenes
# Weights that other code, another recipe or other tiles gave are set aside.
made_of="$(find mmdensecl configs/_base_ configs/mini configs/demo \
    data/demo_tiles -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum | sha256sum)"
if [[ -d "$work_dir" && "$(cat "$work_dir/made_of" 2>/dev/null)" != "$made_of" ]]; then
    aside="$work_dir.$(date +%Y%m%d_%H%M%S)"
    mv "$work_dir" "$aside"
    echo "An older demo's weights are now in $aside"
fi
mkdir -p "$work_dir"
echo "$made_of" > "$work_dir/made_of"
echo '== Training (Ctrl-C stops it, running the demo again goes on)'
# --resume starts afresh where there is no checkpoint yet. So small a network
# keeps one core busy; another one reads the images.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" \
    "$python" tools/train.py "$config" --work-dir "$work_dir" --resume
echo '== What was learnt'
"$python" tools/demo/summary.py "$weights" \
    data/demo_scenes/VOCdevkit/VOC2012 "$work_dir/matches.png"
echo '== Transfer to the scenes (Ctrl-C stops it as well)'
# --redo repeats what an earlier demo did with other weights or code.
"$python" tools/benchmark.py run demo --checkpoint DenseCL="$weights" \
    --data-root data/demo_scenes --mode frozen --seeds 3 --jobs 2 --redo \
    --drop-checkpoints
