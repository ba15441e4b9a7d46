#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Makes .venv what uv.lock says and sets `python` to its interpreter. demo.sh
# and run_tests.sh source this file; `bash tools/env.sh` does only that.
#
#   MMDENSECL_PYTHON   the interpreter of an environment to use as it is
#   UV_PYTHON          the Python of a new environment, such as 3.12
#   MAX_JOBS, CXX      compilers at a time, and which one
#
# and all other variables of uv. Messages go to stderr.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"

die() {
    printf '%s\n' '' "ERROR: $1" "${@:2}" >&2
    exit 1
}

# Sets `uv` to one that pyproject.toml accepts; installs it if there is none.
find_uv() {
    local want candidate
    for uv in uv "$root/.uv/bin/uv"; do
        if "$uv" --project "$root" cache dir &>/dev/null; then return; fi
    done
    want="uv$(sed -n "s/^required-version = '\(.*\)'/\1/p" \
        "$root/pyproject.toml")"
    for candidate in python3 python python3.12 python3.11 python3.10; do
        if ! "$candidate" -c 'import pip' &>/dev/null; then continue; fi
        echo "Installing $want into $root/.uv" >&2
        # --target asks for no venv module, and Debian's pip allows it.
        PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 "$candidate" -m pip install -q \
            --upgrade --target "$root/.uv" "$want" >&2 && return
        die "pip could not install $want; its message is above."
    done
    die 'There is no uv, and no Python with pip to install it.' \
        'On Debian and Ubuntu: apt-get install python3-pip'
}

# check PYTHON: dies or warns where a new environment would fail much later.
check() {
    local gib include
    gib="$(df -Pk "$root" | awk 'END {print int($4 / 1048576)}')"
    if ((gib < 8)); then
        echo "Only $gib GiB are free here, and a new environment takes up to" \
            '8 (UV_CACHE_DIR moves most of it).' >&2
    fi
    include="$("$1" -c \
        'import sysconfig; print(sysconfig.get_paths()["include"])')"
    ${CXX:-c++} -fsyntax-only -I "$include" -x c++ - \
        <<<'#include <Python.h>' >&2 ||
        die "mmcv has to be compiled, and ${CXX:-c++} cannot: see above." \
            "It takes a C++ compiler and the headers of $1." \
            'Debian and Ubuntu: apt-get install build-essential python3-dev' \
            'Where uv still keeps a wheel that it compiled, this will do:' \
            "cd $root; uv sync ${sync[*]}"
}

set_up() {
    local base cuda sync=(--locked --inexact --extra all --extra dev)
    local venv="${UV_PROJECT_ENVIRONMENT:-$root/.venv}"
    if [[ $venv != /* ]]; then venv="$root/$venv"; fi
    python="$venv/bin/python"
    # Newer than the lock once mmcv was seen to work.
    local works="$venv/mmcv_works"
    export UV_PYTHON_DOWNLOADS="${UV_PYTHON_DOWNLOADS:-never}"
    find_uv
    base="$("$uv" --directory "$root" python find ${UV_PYTHON:+"$UV_PYTHON"} \
        2>/dev/null)" ||
        die "${UV_PYTHON:-Python 3.10, 3.11 or 3.12} is not here. uv found:" \
            "$("$uv" python list --only-installed 2>/dev/null)" \
            'Install Python 3.10, 3.11 or 3.12, or name one:' \
            'UV_PYTHON=/path/to/python3.11'
    if [[ ! $works -nt $root/uv.lock ]]; then check "$base"; fi
    # mmcv compiles CUDA ops where it sees a GPU, and cannot without the nvcc
    # of torch's CUDA.
    cuda="$(sed -n 's/^name = "nvidia-cudnn-cu\(.*\)"/\1/p' "$root/uv.lock")"
    (
        if ! nvcc --version 2>/dev/null | grep -q "release $cuda\."; then
            export CUDA_VISIBLE_DEVICES=
        fi
        # Else each process compiles torch and the hosts anew where Python may
        # not write (PYTHONDONTWRITEBYTECODE): ten seconds an import.
        if [[ ! $works -nt $root/uv.lock ]]; then
            export UV_COMPILE_BYTECODE=1
        fi
        "$uv" --directory "$root" sync "${sync[@]}" >&2
    ) || die 'uv could not make the environment; its message is above.' \
        'Run this again: uv keeps what it has. If a compiler was "Killed"' \
        'for want of memory, with MAX_JOBS=1.'
    if [[ $works -nt $root/uv.lock ]]; then return; fi
    "$python" -I -c 'import mmcv.ops' >&2 ||
        die 'mmcv does not work here; Python says above why. If uv compiled' \
            "it for another machine: $uv cache clean mmcv" \
            "rm -r $venv, and run this again."
    touch "$works"
}

if [[ -n ${MMDENSECL_PYTHON:-} ]]; then
    python=$MMDENSECL_PYTHON
else
    set_up
fi
