#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Sets up what is missing (tools/env.sh), then runs the tests.
#
#   bash tools/run_tests.sh                          all tests
#   bash tools/run_tests.sh -m "not slow"            the quick ones
#   bash tools/run_tests.sh tests/test_x.py -k foo   any argument of pytest
#   bash tools/run_tests.sh -n 0 --pdb               in one process
#
# Paths are taken from the repository's root.
set -euo pipefail
SECONDS=0
# Sets `root` and `python`.
# shellcheck source=tools/env.sh
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup_seconds=$SECONDS

# A worker of pytest-xdist for each core, up to 8, and one thread each: the
# tests use small tensors, and some start processes of their own.
# (nproc itself heeds OMP_NUM_THREADS.)
cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null ||
    echo 2)"
workers="$((cores > 8 ? 8 : cores))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [[ -z ${MMDENSECL_DATA_ROOT:-} ]]; then
    echo 'MMDENSECL_DATA_ROOT is not set: the tests that need its pictures' \
        'skip, and say so. Set it to a folder with coco/, cityscapes/,' \
        'VOCdevkit/ and unlabeled/ to run them too.'
else
    # Tests run in other folders than this one.
    MMDENSECL_DATA_ROOT="$(cd "$MMDENSECL_DATA_ROOT" && pwd)" || {
        echo 'MMDENSECL_DATA_ROOT names no folder.' >&2
        exit 2
    }
    export MMDENSECL_DATA_ROOT
    echo "Test data: $MMDENSECL_DATA_ROOT"
fi

echo "Set-up took $setup_seconds s. Running pytest with $workers workers;" \
    'its last line gives the total time.'
cd "$root"
# In the order of tests/conftest.py, where long files come first: xdist's own
# puts those with few tests last.
exec "$python" -m pytest -n "$workers" --dist loadfile \
    --no-loadscope-reorder --durations=15 --durations-min=2 "$@"
