#!/usr/bin/env bash
# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
#
# Prepares a Python environment in which everything here runs; see --help.
#
# How it stays honest:
#   * A stamp in the environment says that it is complete. It is taken away
#     before anything is changed and written (atomically) after the last check
#     passed, so an interrupted run is taken up again and never trusted.
#   * The stamp holds a fingerprint of the lock file, setup.py, the stack,
#     Python and this checkout, and every pin with its version: a second run
#     compares them and is done, or does again what is needed.
#   * A wheel of mmcv enters the cache by one rename, after a look inside.
#   * One set-up of an environment at a time: a second one waits.
#
# The log goes to stderr. stdout carries the interpreter's path with
# --print-python, and nothing otherwise.
#
# The functions can be sourced (tests/tools/test_setup_env.py does).
set -euo pipefail

# Raise when what a finished set-up means changes: old stamps become invalid.
STATE_VERSION=1
PIP_VERSION=26.3
PYTHON_RANGE='3.10, 3.11 or 3.12'
# What a new environment takes (measured with some room): itself, temporary
# files, and pip's cache of downloads, which is left out where room is short.
NEW_ENV_GIB=6 NEW_TMP_GIB=2 NEW_PIP_CACHE_GIB=3
# A started one, or a build of mmcv.
OLD_ENV_GIB=2 MMCV_CACHE_GIB=1
HEARTBEAT_SECONDS=30

EXIT_USAGE=2 EXIT_PYTHON=3 EXIT_COMPILER=4 EXIT_DISK=5 EXIT_INSTALL=6
EXIT_BUSY=7

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
CACHE="${MMDENSECL_CACHE:-${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/mmdensecl}"

usage() {
    cat <<'EOF'
Usage: bash tools/setup_env.sh [options]

Creates the virtual environment .venv, installs the pinned packages of
requirements/lock.txt, builds mmcv with its ops, checks it all and installs
mmdensecl (editable). A second run finds it done and takes a second.

Options:
  --python PATH         Python 3.10, 3.11 or 3.12 to use (or variable PYTHON;
                        default: the first of python3.11, python3.12,
                        python3.10, python3 that runs and fits)
  --current-env         install into the active environment instead of .venv
  --stack upstream      the OpenMMLab packages (default)
  --stack onedl         the onedl fork, in .venv-onedl
  --mmcv-ops auto       CUDA ops where a GPU and a fitting nvcc are, else CPU
  --mmcv-ops cpu|cuda   decide it (cuda also on a node that has no GPU itself;
                        set TORCH_CUDA_ARCH_LIST there)
  --print-python        print the interpreter's path on stdout at the end
  -h, --help            this text

Variables:
  MMDENSECL_CACHE         where built wheels of mmcv are kept
                          (default: ~/.cache/mmdensecl)
  MMDENSECL_MIN_FREE_GIB  room asked for on every disk involved, instead of
                          what is known to be needed (0: do not look)
  MMDENSECL_LOCK_WAIT     seconds to wait for another set-up (default: 3600)
  MAX_JOBS                compilers at a time (default: one a core, and at
                          least 2 GiB of memory each)
  CXX                     C++ compiler

Exit status: 0 ready, 2 wrong usage, 3 no fitting Python, 4 no compiler,
5 no room on disk, 6 a step of the installation failed, 7 another set-up of
the same environment did not finish.
EOF
}

# ---------------------------------------------------------------- messages

log() { printf '%s\n' "$*" >&2; }

# die STATUS LINE...: the first line says what is wrong, the others what to do.
die() {
    local status=$1
    shift
    log ''
    log "setup_env: ERROR: $1"
    shift
    local line
    for line in "$@"; do log "  $line"; done
    exit "$status"
}

step() {
    STEP=$((${STEP:-0} + 1))
    log "[$STEP/6] $*"
}

minutes() { printf '%d:%02d min' $(($1 / 60)) $(($1 % 60)); }

heartbeat() { # LABEL [FOLDER whose object files tell the progress]
    # read waits without a child process, which would outlive this one.
    local begin=$SECONDS pause note
    exec 9>&- {pause}<> <(:)
    while read -rt "$HEARTBEAT_SECONDS" -u "$pause" || kill -0 $$ 2>/dev/null
    do
        note=''
        if [[ -n ${2:-} ]]; then
            note="$(find "$2" -name '*.o' 2>/dev/null | wc -l)"
            note=", $note files compiled"
        fi
        log "      ... $1: $(minutes $((SECONDS - begin)))$note"
    done
}

# run_logged LABEL FOLDER COMMAND...: output to $LOG, signs of life here.
run_logged() {
    local label=$1 folder=$2 status=0
    shift 2
    printf '\n== %s: %s\n' "$(date '+%F %T')" "$*" >>"$LOG"
    heartbeat "$label" "$folder" &
    HEARTBEAT=$!
    # In a process group of its own (set -m), so that an end of this script
    # ends its compilers too; and waited for, so that a signal is heard.
    set -m
    "$@" >>"$LOG" 2>&1 </dev/null &
    CHILD=$!
    set +m
    note_holder
    wait "$CHILD" || status=$?
    CHILD=''
    note_holder
    stop_heartbeat
    return "$status"
}

stop_heartbeat() {
    if [[ -n ${HEARTBEAT:-} ]]; then
        kill "$HEARTBEAT" 2>/dev/null || true
        wait "$HEARTBEAT" 2>/dev/null || true
        HEARTBEAT=''
    fi
}

cleanup() {
    stop_heartbeat
    if [[ -n ${CHILD:-} ]]; then
        kill -TERM -- "-$CHILD" 2>/dev/null || true
        wait "$CHILD" 2>/dev/null || true
    fi
    if [[ -n ${BUILD_DIR:-} ]]; then rm -rf "$BUILD_DIR"; fi
}

show_log() {
    log "      the last lines of $LOG:"
    tail -n 20 "$LOG" | sed 's/^/      | /' >&2
}

# pip_install WHAT ARGUMENT...
pip_install() {
    local what=$1
    shift
    if ! run_logged "$what" '' "${PIP[@]}" install "$@"; then
        show_log
        die "$EXIT_INSTALL" "pip could not install $what." \
            'Was it the network or the index? Then run this again: what is' \
            'installed stays.' \
            "The whole log: $LOG"
    fi
}

# ------------------------------------------------------------------ options

parse_args() {
    MODE=venv STACK=upstream PRINT_PYTHON=0 MMCV_OPS=auto
    PYTHON_WANTED=${PYTHON:-}
    while (($#)); do
        case $1 in
            --python=* | --stack=* | --mmcv-ops=*)
                set -- "${1%%=*}" "${1#*=}" "${@:2}"
                ;;
        esac
        case $1 in
            --python | --stack | --mmcv-ops)
                if (($# < 2)); then
                    die "$EXIT_USAGE" "$1 needs a value (see --help)."
                fi
                ;;&
            --python) PYTHON_WANTED=$2 && shift 2 ;;
            --stack) STACK=$2 && shift 2 ;;
            --mmcv-ops) MMCV_OPS=$2 && shift 2 ;;
            --current-env) MODE=current && shift ;;
            --print-python) PRINT_PYTHON=1 && shift ;;
            -h | --help) usage && exit 0 ;;
            *) die "$EXIT_USAGE" "unknown option $1 (see --help)." ;;
        esac
    done
    case $MMCV_OPS in
        auto | cpu | cuda) ;;
        *) die "$EXIT_USAGE" \
            "--mmcv-ops is auto, cpu or cuda, not '$MMCV_OPS'." ;;
    esac
    case $STACK in
        upstream)
            LOCK="$ROOT/requirements/lock.txt" MMCV_DIST=mmcv
            ENV_DIR="$ROOT/.venv"
            ;;
        onedl)
            LOCK="$ROOT/requirements/lock-onedl.txt" MMCV_DIST=onedl-mmcv
            ENV_DIR="$ROOT/.venv-onedl"
            ;;
        *) die "$EXIT_USAGE" \
            "--stack is upstream or onedl, not '$STACK'." ;;
    esac
    LOCK_NAME=${LOCK#"$ROOT"/}
}

# pin NAME: the version of a package in the lock.
pin() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$LOCK" | head -n 1; }

# ------------------------------------------------------------------- Python

# python_version COMMAND: its version; fails when it does not run (a pyenv
# shim may stand in PATH without anything behind it).
python_version() {
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' \
        2>/dev/null </dev/null
}

version_fits() { [[ $1 =~ ^3\.1[012]\. ]]; }

# Sets BASE_PYTHON to the interpreter that makes the environment.
choose_python() {
    local name path version candidates found=()
    if [[ -n $PYTHON_WANTED ]]; then
        candidates=("$PYTHON_WANTED")
    elif [[ $MODE == current ]]; then
        candidates=(python python3)
    else
        candidates=(python3.11 python3.12 python3.10 python3)
    fi
    for name in "${candidates[@]}"; do
        if ! path="$(command -v "$name")"; then
            found+=("$name: not found")
        elif ! version="$(python_version "$path")"; then
            found+=("$name: $path does not run")
        elif ! version_fits "$version"; then
            found+=("$name: $path is Python $version")
        elif [[ $MODE == venv ]] &&
            ! "$path" -c 'import ensurepip, venv' 2>/dev/null; then
            found+=("$name: $path has no venv module (on Debian and Ubuntu:
      apt-get install python${version%.*}-venv)")
        else
            # Behind a shim of pyenv, whose answer depends on the folder.
            BASE_PYTHON="$("$path" -c 'import sys; print(sys.executable)')"
            BASE_VERSION=$version
            return
        fi
        # The active environment is one interpreter: `python`, and python3
        # only where there is no python at all.
        if [[ $MODE == current && -n $path ]]; then break; fi
    done
    die "$EXIT_PYTHON" "Python $PYTHON_RANGE is needed, with venv. Found:" \
        "${found[@]/#/- }" \
        'Install one of them, or name one: --python /path/to/python3.11'
}

absolute() {
    case $1 in
        /*) printf '%s\n' "$1" ;;
        *) printf '%s/%s\n' "$PWD" "$1" ;;
    esac
}

# The environment's own interpreter, when it runs and has pip.
env_alive() {
    ENV_VERSION="$(python_version "$ENV_PYTHON")" &&
        version_fits "$ENV_VERSION" &&
        "$ENV_PYTHON" -c 'import pip' 2>/dev/null </dev/null
}

# ------------------------------------------------------------------- checks

# Nearest folder above (or at) a path that exists already.
existing_parent() {
    local path=$1
    while [[ ! -d $path ]]; do path="$(dirname "$path")"; done
    printf '%s\n' "$path"
}

# disk_lack GIB FOLDER [GIB FOLDER]...: prints what is missing on the first
# disk that cannot hold its share; nothing when all have room.
disk_lack() {
    local -A need=() free=() where=()
    local gib folder line disk
    while (($#)); do
        gib=$1 folder="$(existing_parent "$2")"
        shift 2
        line="$(df -Pk "$folder" | tail -n 1)"
        # Fields: device, blocks, used, available, capacity, mount point.
        disk="$(awk '{print $6}' <<<"$line")"
        free[$disk]="$(awk '{print int($4 / 1048576)}' <<<"$line")"
        need[$disk]=$((${need[$disk]:-0} + gib))
        where[$disk]+="${where[$disk]:+, }$folder"
    done
    for disk in "${!need[@]}"; do
        gib=${MMDENSECL_MIN_FREE_GIB:-${need[$disk]}}
        if ((${free[$disk]} < gib)); then
            printf 'no room on the disk at %s: %s GiB are free, %s GiB are' \
                "$disk" "${free[$disk]}" "$gib"
            printf ' needed (for %s).\n' "${where[$disk]}"
            return
        fi
    done
}

# Dies where the disks are too small; without room for pip's cache of downloads
# pip goes without it.
check_room() {
    local lack cache="${PIP_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/pip}"
    local shares=("$OLD_ENV_GIB" "$ENV_DIR" "$MMCV_CACHE_GIB" "$CACHE")
    if [[ ! -f $STATE_DIR/torch ]]; then
        shares=("$NEW_ENV_GIB" "$ENV_DIR" "$MMCV_CACHE_GIB" "$CACHE"
            "$NEW_TMP_GIB" "${TMPDIR:-/tmp}")
    fi
    lack="$(disk_lack "${shares[@]}")"
    if [[ -n $lack ]]; then
        die "$EXIT_DISK" "$lack" \
            'Make room, or move what is large: TMPDIR for temporary files,' \
            'MMDENSECL_CACHE for built wheels.'
    fi
    if [[ -f $STATE_DIR/torch || -n ${PIP_NO_CACHE_DIR:-} ]]; then return; fi
    # What is cached already, from another environment, stays and is used.
    local missing=$((NEW_PIP_CACHE_GIB - $(gib_of "$cache")))
    if ((missing > 0)) &&
        [[ -n "$(disk_lack "${shares[@]}" "$missing" "$cache")" ]]; then
        log "      no room for pip's cache of downloads in $cache:"
        log '      pip goes without it'
        export PIP_NO_CACHE_DIR=1
    fi
}

# Size of a folder in GiB, rounded down; 0 where there is none.
gib_of() {
    local kib
    kib="$(du -sk "$1" 2>/dev/null | awk '{print $1}' || true)"
    printf '%d\n' $((${kib:-0} / 1048576))
}

# check_compiler PYTHON: compiles and links a real extension module.
check_compiler() {
    local compiler include dir
    if [[ -n ${CXX:-} ]]; then
        compiler=$CXX
    else
        # The name that torch.utils.cpp_extension uses, then the usual ones.
        for compiler in c++ g++ clang++ ''; do
            if command -v "$compiler" >/dev/null; then break; fi
        done
    fi
    if [[ -z $compiler ]] || ! command -v "${compiler%% *}" >/dev/null; then
        die "$EXIT_COMPILER" \
            "no C++ compiler found (${CXX:-c++, g++, clang++}): mmcv's ops\
 have to be compiled." \
            'On Debian and Ubuntu: apt-get install build-essential' \
            'On Fedora and RHEL: dnf install gcc-c++' \
            'Without root: conda install -c conda-forge cxx-compiler' \
            'Or copy a wheel that was built elsewhere to' \
            "$CACHE/wheels"
    fi
    # torch's build uses c++ unless CXX is set.
    if [[ -z ${CXX:-} && $compiler != c++ ]]; then export CXX=$compiler; fi
    include="$("$1" -c \
        'import sysconfig; print(sysconfig.get_paths()["include"])')"
    if [[ ! -f $include/Python.h ]]; then
        die "$EXIT_COMPILER" "Python's headers are missing:\
 $include/Python.h does not exist." \
            'On Debian and Ubuntu: apt-get install python3-dev (or the' \
            'python3.X-dev of your Python)' \
            'On Fedora and RHEL: dnf install python3-devel'
    fi
    dir="$(mktemp -d)"
    cat >"$dir/probe.cpp" <<'EOF'
#include <Python.h>
#include <optional>
#include <string>
std::optional<std::string> probe() { return std::string(Py_GetVersion()); }
EOF
    # CXX may carry options: it is split into words on purpose.
    # shellcheck disable=SC2086
    if ! $compiler -std=c++17 -fPIC -shared -I "$include" "$dir/probe.cpp" \
        -o "$dir/probe.so" >"$dir/log" 2>&1; then
        tail -n 20 "$dir/log" | sed 's/^/      | /' >&2
        rm -rf "$dir"
        die "$EXIT_COMPILER" \
            "the C++ compiler '$compiler' cannot compile and link a small\
 C++17 extension (its messages are above)." \
            'Name another one: CXX=/path/to/g++ (GCC 9 or later)'
    fi
    rm -rf "$dir"
}

# Packages that would share their modules with what is installed here.
check_clashes() {
    local rivals=(mmcv-lite mmcv-full) found
    case $STACK in
        upstream) rivals+=(onedl-mmcv onedl-mmengine onedl-mmpretrain
            onedl-mmdetection onedl-mmsegmentation) ;;
        onedl) rivals+=(mmcv mmengine mmpretrain mmdet mmsegmentation) ;;
    esac
    found="$("$ENV_PYTHON" - "${rivals[@]}" <<'PY'
import sys
from importlib.metadata import distributions

names = {(d.metadata['Name'] or '').lower() for d in distributions()}
print(' '.join(name for name in sys.argv[1:] if name in names))
PY
    )"
    if [[ -n $found ]]; then
        die "$EXIT_USAGE" \
            "$ENV_DIR holds packages that install the same modules as the\
 '$STACK' stack: $found" \
            "Remove them: $ENV_PYTHON -m pip uninstall $found" \
            'or take an environment of its own: without --current-env, or' \
            'with .venv moved away.'
    fi
}

check_current_env() {
    local problem
    problem="$("$ENV_PYTHON" - <<'PY'
import os
import sys
import sysconfig

managed = os.path.join(sysconfig.get_path('stdlib'), 'EXTERNALLY-MANAGED')
if sys.prefix == sys.base_prefix and os.path.exists(managed):
    print('is managed by the operating system')
elif not os.access(sysconfig.get_path('purelib'), os.W_OK):
    print('cannot be written to')
else:
    try:
        import pip  # noqa: F401
    except ImportError:
        print('has no pip')
PY
    )"
    if [[ -n $problem ]]; then
        die "$EXIT_PYTHON" \
            "the active environment ($ENV_PYTHON) $problem." \
            'Activate a virtual or conda environment first, or leave out' \
            '--current-env, to get an environment of its own.'
    fi
}

# -------------------------------------------------------------------- state

# state COMMAND [OPS]: `check` fails, and says why, unless the stamp is that
# of a complete environment; `write` writes it for mmcv's ops cpu or cuda.
state() {
    "$ENV_PYTHON" - "$1" "$STAMP" "$STATE_VERSION" "$STACK" "$ROOT" "$LOCK" \
        "$MMCV_OPS" "${2:-}" <<'PY'
import hashlib
import json
import os
import sys
from importlib import metadata, util
from pathlib import Path

command, stamp, state_version, stack, root, lock, wanted, ops = sys.argv[1:]
stamp = Path(stamp)


def fingerprint():
    value = hashlib.sha256()
    words = (state_version, stack, root, sys.version, sys.prefix)
    for part in [word.encode() for word in words] + [
            Path(lock).read_bytes(), (Path(root) / 'setup.py').read_bytes()]:
        value.update(hashlib.sha256(part).digest())
    return value.hexdigest()


def pins():
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    lines = Path(lock).read_text(encoding='utf-8').splitlines()
    lines = [line.split('#')[0].strip() for line in lines]
    requirements = [Requirement(line) for line in lines if line]
    return {
        r.name: str(r.specifier).removeprefix('==')
        for r in requirements if r.marker is None or r.marker.evaluate()
    }


def installed(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def problem():
    try:
        state = json.loads(stamp.read_text(encoding='utf-8'))
        then, packages = state['fingerprint'], state['packages']
        kind = state['mmcv_ops']
    except FileNotFoundError:
        return 'it is new, or an earlier run did not finish'
    except (OSError, ValueError, KeyError, TypeError):
        return f'{stamp} cannot be read'
    if then != fingerprint():
        return 'the lock file, setup.py or Python changed since'
    if wanted not in ('auto', kind):
        return f'mmcv has {kind} ops and {wanted} ops are wanted'
    for name, version in packages.items():
        now = installed(name)
        # A local version (2.11.0+cu130) is the same release.
        if now is None or now.split('+')[0] != version.split('+')[0]:
            return f'{name} is {now or "missing"}, not {version}'
    if installed('mmdensecl') is None:
        return 'mmdensecl itself is missing'
    spec = util.find_spec('mmcv')
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not any(folder.glob('_ext*.so')):
        return "mmcv's compiled ops are missing"


if command == 'check':
    reason = problem()
    if reason:
        print(reason)
        sys.exit(1)
else:
    state = dict(fingerprint=fingerprint(), mmcv_ops=ops, packages=pins())
    draft = stamp.with_name(f'{stamp.name}.{os.getpid()}')
    draft.write_text(json.dumps(state, indent=1) + '\n', encoding='utf-8')
    os.replace(draft, stamp)
PY
}

# Writes who holds the lock: this process, and the group of its command.
note_holder() {
    if [[ -n ${LOCK_FILE:-} ]]; then
        printf '%s %s\n' "$$" "${CHILD:-}" >"$LOCK_FILE"
    fi
}

# Holds file descriptor 9 on a lock until this script and all that it started
# are gone: two at a time would write over each other.
take_lock() {
    local status=0 holder='' child=''
    if ! mkdir -p "$CACHE/locks" || [[ ! -w $CACHE/locks ]]; then
        die "$EXIT_USAGE" "the cache folder $CACHE cannot be written to." \
            'Name another one: MMDENSECL_CACHE=/path/to/folder'
    fi
    if ! command -v flock >/dev/null; then return; fi
    LOCK_FILE="$CACHE/locks/$(printf '%s' "$ENV_DIR" | cksum |
        cut -d' ' -f1).lock"
    exec 9<>"$LOCK_FILE"
    flock -n -E 75 9 2>/dev/null || status=$?
    if ((status == 75)); then
        read -r holder child <"$LOCK_FILE" || true
        if ! end_orphan "$holder" "$child"; then
            log "Another set-up of $ENV_DIR is at work (process\
 ${holder:-unknown}): waiting for it. Ctrl-C gives up."
        fi
        status=0
        flock -w "${MMDENSECL_LOCK_WAIT:-3600}" -E 75 9 || status=$?
    fi
    if ((status == 75)); then
        die "$EXIT_BUSY" \
            "another set-up of $ENV_DIR did not finish in time." \
            "See what holds $LOCK_FILE (fuser -v shows it), end it, and run" \
            'this again.'
    fi
    # Any other status: a file system without locks. Better without one than
    # not at all.
    note_holder
}

# end_orphan HOLDER CHILD: a set-up that was killed (-9) leaves its pip, and
# pip's compilers, at work. Ends them, after a look that it is them.
end_orphan() {
    local words
    if [[ ! $1 =~ ^[0-9]+$ || ! $2 =~ ^[0-9]+$ ]] || kill -0 "$1" 2>/dev/null
    then
        return 1
    fi
    mapfile -d '' -t words <"/proc/$2/cmdline" 2>/dev/null || return 1
    if [[ "${words[*]}" != *"$ENV_PYTHON -m pip "* ]]; then return 1; fi
    log "An earlier set-up was killed and left its pip at work: ending that\
 (process $2)."
    kill -TERM -- "-$2" 2>/dev/null || true
}

# -------------------------------------------------------------------- steps

create_venv() {
    if env_alive; then
        if [[ -z $PYTHON_WANTED || ${ENV_VERSION%.*} == "${BASE_VERSION%.*}" ]]
        then
            step "Using the virtual environment $ENV_DIR (Python $ENV_VERSION)"
            check_clashes
            mkdir -p "$STATE_DIR"
            forget_broken_packages
            return
        fi
        step "Creating $ENV_DIR again: it has Python $ENV_VERSION,\
 $BASE_VERSION is wanted"
    elif [[ -e $ENV_DIR || -L $ENV_DIR ]]; then
        # Never takes away what it did not make, unless it is a dead
        # environment.
        if [[ ! -d $STATE_DIR ]] && { [[ ! -f $ENV_DIR/pyvenv.cfg ]] ||
            python_version "$ENV_PYTHON" >/dev/null; }; then
            die "$EXIT_USAGE" \
                "$ENV_DIR exists, was not made by this script, and is no\
 environment of Python $PYTHON_RANGE with pip." \
                'Move it away, then run this again.'
        fi
        step "Creating $ENV_DIR again (Python $BASE_VERSION): it is incomplete\
 or its Python does not run"
    else
        step "Creating the virtual environment $ENV_DIR (Python $BASE_VERSION)"
    fi
    rm -rf "$ENV_DIR"
    # Says whose folder it is, should the next command be interrupted.
    mkdir -p "$STATE_DIR"
    if ! "$BASE_PYTHON" -m venv "$ENV_DIR" >>"$LOG" 2>&1; then
        show_log
        die "$EXIT_INSTALL" "$BASE_PYTHON -m venv failed (log above)."
    fi
    ENV_VERSION="$(python_version "$ENV_PYTHON")"
}

# A pip that was killed leaves packages that look installed and lack files.
# Takes their metadata away, so that pip installs them again.
forget_broken_packages() {
    local broken
    broken="$("$ENV_PYTHON" - "$LOCK" <<'PY'
import collections
import csv
import re
import shutil
import sys
import sysconfig
from pathlib import Path


def normalize(name):
    return re.sub(r'[-_.]+', '-', name).lower()


def read(path):
    return path.read_text(encoding='utf-8') if path.is_file() else ''


def records(info):
    return list(csv.reader(read(info / 'RECORD').splitlines()))


def is_broken(info, sizes):
    if read(info / 'INSTALLER').strip() not in ('', 'pip'):
        return False  # conda's, for example: not ours to judge
    for name, _, _ in records(info):
        path = info.parent / name
        # In its own folder pip changes files after their size was noted.
        if path.parent == info or path.suffix == '.pyc':
            continue
        known = sizes[name] - {''}
        if not path.is_file() or known and str(
                path.stat().st_size) not in known:
            return True
    return not (read(info / 'RECORD') and read(info / 'METADATA'))


lines = Path(sys.argv[1]).read_text(encoding='utf-8').splitlines()
locked = {normalize(line.split('==')[0]) for line in lines if '==' in line}
for folder in {sysconfig.get_path(key) for key in ('purelib', 'platlib')}:
    infos = sorted(Path(folder).glob('*.dist-info'))
    # Two packages may install the same file (modelindex and model-index do).
    sizes = collections.defaultdict(set)
    for info in infos:
        for name, _, size in records(info):
            sizes[name].add(size)
    for info in infos:
        name = normalize(info.name.split('-')[0])
        if name in locked and is_broken(info, sizes):
            shutil.rmtree(info)
            print(name)
PY
    )"
    if [[ -n $broken ]]; then
        log "      only half installed, will be again: ${broken//$'\n'/ }"
    fi
}

# requirements PATTERN: the lock's lines without comments and mmcv, whose
# name matches PATTERN; with a leading ! those that do not.
requirements() {
    local invert=()
    if [[ $1 == '!'* ]]; then invert=(-v); fi
    grep -E '^[a-z]' "$LOCK" | grep -Ev "^$MMCV_DIST==" |
        grep -E ${invert[@]+"${invert[@]}"} "^(${1#!})"
}

# In two rounds, as pip unpacks a whole round into temporary files first.
TORCH_PARTS='torch==|torchvision==|triton=='
TORCH_LIBRARIES='nvidia-|cuda-'

install_torch() {
    step "Installing torch $(pin torch) and torchvision $(pin torchvision)\
 with the libraries they carry (2.5 GB to download, if not cached)"
    # pip makes no changes on one's own environment without being asked.
    if [[ $MODE == venv ]]; then
        pip_install "pip $PIP_VERSION" "pip==$PIP_VERSION"
    fi
    install_pins "torch's libraries" "$TORCH_LIBRARIES"
    install_pins torch "$TORCH_PARTS"
    touch "$STATE_DIR/torch"
}

# install_pins WHAT PATTERN: the lock's packages that `requirements` names. The
# lock is complete, so pip need not resolve anything (--no-deps).
install_pins() {
    local status=0
    requirements "$2" >"$STATE_DIR/requirements.txt" || status=$?
    # grep's 1: a torch without CUDA carries no such libraries.
    if [[ $status == 1 && $2 == "$TORCH_LIBRARIES" ]]; then return 0; fi
    if ((status)); then
        die "$EXIT_INSTALL" "$LOCK_NAME does not name $1, or cannot be read."
    fi
    pip_install "$1" --no-deps -r "$STATE_DIR/requirements.txt"
}

install_lock() {
    step "Installing the pinned packages of $LOCK_NAME"
    install_pins "the packages of $LOCK_NAME" "!$TORCH_PARTS|$TORCH_LIBRARIES"
}

# --------------------------------------------------------------------- mmcv

find_nvcc() {
    if [[ -n ${CUDA_HOME:-} && -x $CUDA_HOME/bin/nvcc ]]; then
        printf '%s\n' "$CUDA_HOME/bin/nvcc"
    else
        command -v nvcc
    fi
}

# Sets OPS (cpu or cuda) and OPS_WHY.
choose_ops() {
    local torch_cuda nvcc nvcc_cuda
    torch_cuda="$("$ENV_PYTHON" -c \
        'import torch; print(torch.version.cuda or "")')"
    OPS=cpu OPS_NOTE=''
    if [[ $MMCV_OPS == cpu ]]; then
        OPS_WHY='--mmcv-ops cpu'
        return
    fi
    if ! "$ENV_PYTHON" -c \
        'import sys, torch; sys.exit(not torch.cuda.is_available())' \
        2>/dev/null; then
        OPS_WHY='no GPU that torch can use on this machine'
        if [[ $MMCV_OPS == cuda ]]; then
            OPS=cuda OPS_WHY='--mmcv-ops cuda'
            if ! find_nvcc >/dev/null || [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]
            then
                die "$EXIT_COMPILER" "CUDA ops on a machine without a GPU\
 need nvcc (CUDA_HOME or PATH) and TORCH_CUDA_ARCH_LIST." \
                    'For example: TORCH_CUDA_ARCH_LIST="8.0;9.0"' \
                    "torch here was built with CUDA ${torch_cuda:-none}."
            fi
        fi
        return
    fi
    OPS_NOTE="The GPU serves pre-training, but mmdet's and mmcv's own ops run\
 on the CPU only. Install the CUDA toolkit $torch_cuda and run\
 bash tools/setup_env.sh --mmcv-ops cuda"
    if ! nvcc="$(find_nvcc)"; then
        if [[ $MMCV_OPS == cuda ]]; then
            die "$EXIT_COMPILER" 'CUDA ops need nvcc, which is not there.' \
                "Install the CUDA toolkit $torch_cuda, and set CUDA_HOME."
        fi
        OPS_WHY='a GPU, but no nvcc to compile CUDA ops'
        return
    fi
    nvcc_cuda="$("$nvcc" --version |
        sed -n 's/.*release \([0-9.]*\),.*/\1/p')" || nvcc_cuda=''
    if [[ -z $nvcc_cuda || ${nvcc_cuda%%.*} != "${torch_cuda%%.*}" ]]; then
        OPS_WHY="nvcc is ${nvcc_cuda:-unknown}, torch was built with CUDA\
 ${torch_cuda:-none}"
        return
    fi
    OPS=cuda OPS_NOTE='' OPS_WHY="a GPU, and nvcc $nvcc_cuda"
}

# Where the cache keeps the wheel for this Python, torch and kind of ops.
wheel_dir() { # OPS
    "$ENV_PYTHON" - "$CACHE" "$1" "${TORCH_CUDA_ARCH_LIST:-}" <<'PY'
import platform
import re
import sys

import torch

cache, ops, archs = sys.argv[1:]
if ops == 'cuda':
    if not archs and torch.cuda.is_available():
        archs = '.'.join(map(str, torch.cuda.get_device_capability()))
    ops += torch.version.cuda + '-sm' + re.sub(r'[^0-9A-Za-z.+]+', '_', archs)
tag = 'cp%d%d' % sys.version_info[:2]
print(f'{cache}/wheels/{tag}-torch{torch.__version__}-{ops}-'
      f'{platform.machine()}')
PY
}

# wheel_valid PYTHON FILE: a whole zip file that holds the compiled ops.
wheel_valid() {
    "$1" - "$2" <<'PY'
import fnmatch
import sys
import zipfile

try:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        whole = wheel.testzip() is None
        ops = fnmatch.filter(wheel.namelist(), 'mmcv/_ext*.so')
except (OSError, zipfile.BadZipFile):
    sys.exit(1)
sys.exit(not (whole and ops))
PY
}

# cached_wheel FOLDER: prints the valid wheel; takes a broken one away.
cached_wheel() {
    local file
    for file in "$1/${MMCV_DIST//-/_}-$(pin "$MMCV_DIST")-"*.whl; do
        if [[ ! -f $file ]]; then continue; fi
        if wheel_valid "${ENV_PYTHON_OR_BASE:-$ENV_PYTHON}" "$file"; then
            printf '%s\n' "$file"
            return
        fi
        log "      the cached wheel $file is damaged: removing it"
        rm -f "$file"
    done
    return 1
}

# Whether a compiler will be needed: not when a wheel from an earlier build
# fits (torch's exact build is not known yet, so this looks a bit wider).
any_cached_wheel() {
    local dir tag=${BASE_VERSION%.*} ENV_PYTHON_OR_BASE=$BASE_PYTHON
    for dir in "$CACHE/wheels/cp${tag/./}-torch$(pin torch)"*; do
        if cached_wheel "$dir" >/dev/null; then return; fi
    done
    return 1
}

build_jobs() {
    local cores gib
    # nproc itself heeds OMP_NUM_THREADS.
    cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null ||
        echo 2)"
    gib="$(awk '/^MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo \
        2>/dev/null || true)"
    gib=$((${gib:-4} / 2))
    if ((gib < cores)); then cores=$gib; fi
    printf '%s\n' "$((cores > 1 ? cores : 1))"
}

# build_wheel OPS FOLDER: prints the wheel's path.
build_wheel() {
    local ops=$1 dir=$2 built file jobs setup
    check_compiler "$ENV_PYTHON"
    jobs=${MAX_JOBS:-$(build_jobs)}
    remove_stale_builds
    mkdir -p "$dir" || return 1
    # Beside its destination, so that moving it there is one rename.
    BUILD_DIR="$CACHE/build-$$"
    rm -rf "$BUILD_DIR"
    mkdir -p "$BUILD_DIR/tmp" || return 1
    LOG="$STATE_DIR/mmcv-build.log"
    : >"$LOG"
    setup=(MMCV_WITH_OPS=1 "MAX_JOBS=$jobs" "TMPDIR=$BUILD_DIR/tmp"
        # No debug symbols: they cost time and make the wheel large.
        "CFLAGS=${CFLAGS:-} -g0")
    if [[ $ops == cuda ]]; then
        setup+=(FORCE_CUDA=1)
    else
        setup+=(FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=)
    fi
    log "      compiling $MMCV_DIST $(pin "$MMCV_DIST") with $ops ops\
 ($OPS_WHY), $jobs file(s) at a time: 10-15 minutes on two cores, once"
    # pip's own cache of built wheels knows nothing of torch's version or of
    # the kind of ops: --no-cache-dir keeps it out.
    if ! run_logged 'compiling mmcv' "$BUILD_DIR/tmp" \
        env "${setup[@]}" "${PIP[@]}" wheel --no-deps --no-build-isolation \
        --no-cache-dir --no-binary "$MMCV_DIST" --wheel-dir "$BUILD_DIR" \
        "$MMCV_DIST==$(pin "$MMCV_DIST")"; then
        return 1
    fi
    built="$(find "$BUILD_DIR" -maxdepth 1 -name '*.whl')"
    if [[ -z $built ]] || ! wheel_valid "$ENV_PYTHON" "$built"; then
        echo 'The build ended well but its wheel holds no mmcv/_ext*.so.' \
            >>"$LOG"
        return 1
    fi
    file="$dir/$(basename "$built")"
    mv -f "$built" "$file" || return 1
    rm -rf "$BUILD_DIR"
    BUILD_DIR=''
    WHEEL=$file
}

# Folders of builds that were killed, not of those at work.
remove_stale_builds() {
    local dir
    for dir in "$CACHE"/build-*; do
        if [[ -d $dir ]] && ! kill -0 "${dir##*-}" 2>/dev/null; then
            rm -rf "$dir"
        fi
    done
}

# mmcv_ops_kind: prints cpu or cuda when mmcv's ops really work.
mmcv_ops_kind() {
    "$ENV_PYTHON" - "$MMCV_DIST" "$(pin "$MMCV_DIST")" 2>>"$LOG" <<'PY'
import sys
from importlib.metadata import version

import torch
from mmcv.ops import get_compiling_cuda_version, nms

name, pinned = sys.argv[1:]
if version(name) != pinned:
    sys.exit(f'{name} is {version(name)}, not {pinned}')
boxes = torch.tensor([[0., 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
_, keep = nms(boxes, torch.tensor([.9, .8, .7]), iou_threshold=.5)
if keep.tolist() != [0, 2]:
    sys.exit(f'nms kept {keep.tolist()}, not [0, 2]')
cuda = get_compiling_cuda_version()
print('cpu' if cuda == 'not available' else 'cuda')
PY
}

install_wheel() {
    run_logged mmcv '' "${PIP[@]}" install --no-deps --force-reinstall \
        --no-index "$1" || return 1
    OPS_INSTALLED="$(mmcv_ops_kind)" && [[ $OPS_INSTALLED == "$OPS" ]]
}

# Installs mmcv with the ops $OPS; fails without an exit.
install_mmcv_ops() {
    local dir
    dir="$(wheel_dir "$OPS" 2>>"$LOG")" || return 1
    if WHEEL="$(cached_wheel "$dir")"; then
        log "      from the cache: $WHEEL"
        if install_wheel "$WHEEL"; then return; fi
        # For example built on a machine with a newer C library.
        log '      the cached wheel does not work here: building it again'
        rm -f "$WHEEL"
    fi
    build_wheel "$OPS" "$dir" && install_wheel "$WHEEL"
}

install_mmcv() {
    local setup_log=$LOG
    choose_ops
    step "mmcv $(pin "$MMCV_DIST") with $OPS ops: $OPS_WHY"
    if [[ -n $OPS_NOTE ]]; then log "      note: $OPS_NOTE"; fi
    if OPS_INSTALLED="$(mmcv_ops_kind)" && [[ $OPS_INSTALLED == "$OPS" ]]
    then
        log '      installed already, and its ops work'
        return
    fi
    if ! install_mmcv_ops; then
        if [[ $OPS == cuda && $MMCV_OPS == auto ]]; then
            log "      the CUDA ops could not be built (see $LOG):"
            log '      building CPU ops instead. Pre-training is as fast with'
            log '      them; mmdet on this GPU needs the CUDA ops.'
            cp -f "$LOG" "$STATE_DIR/mmcv-cuda-build.log"
            OPS=cpu OPS_WHY='the CUDA build failed'
            if install_mmcv_ops; then
                LOG=$setup_log
                return
            fi
        fi
        show_log
        die "$EXIT_INSTALL" \
            "mmcv with its ops could not be built, or does not work." \
            'Out of memory (a compiler "Killed")? Run again with MAX_JOBS=1.' \
            'Another compiler: CXX=/path/to/g++. Then run this again; the' \
            'steps before it are kept.' \
            "The whole log: $LOG"
    fi
    LOG=$setup_log
}

# ------------------------------------------------------------- last checks

install_package() {
    step 'Installing mmdensecl itself (editable), and checking all of it'
    pip_install mmdensecl --no-deps --no-build-isolation --editable "$ROOT"
    if ! run_logged 'importing the packages' '' "$ENV_PYTHON" -c '
import torch, torchvision, mmengine, mmcv, mmpretrain, mmdet, mmseg
import mmdensecl
for module in (torch, torchvision, mmengine, mmcv, mmpretrain, mmdet, mmseg,
               mmdensecl):
    print(module.__name__, module.__version__)
'; then
        show_log
        die "$EXIT_INSTALL" 'the installed packages cannot be imported.' \
            "The whole log: $LOG"
    fi
}

# --------------------------------------------------------------------- main

# Sets ENV_DIR, ENV_PYTHON, STATE_DIR and STAMP.
locate_env() {
    if [[ $MODE == current ]]; then
        choose_python
        ENV_PYTHON=$BASE_PYTHON
        ENV_DIR="$("$ENV_PYTHON" -c 'import sys; print(sys.prefix)')"
    else
        ENV_PYTHON="$ENV_DIR/bin/python"
    fi
    STATE_DIR="$ENV_DIR/.mmdensecl"
    STAMP="$STATE_DIR/stamp.json"
    LOG="$STATE_DIR/setup.log"
    PIP=("$ENV_PYTHON" -m pip --disable-pip-version-check --no-input)
}

# Fails, with the reason in REASON, unless the environment is complete and of
# the wanted Python.
env_ready() {
    REASON="$ENV_DIR does not exist"
    if [[ ! -x $ENV_PYTHON ]]; then return 1; fi
    REASON="the Python in $ENV_DIR does not run"
    if ! ENV_VERSION="$(python_version "$ENV_PYTHON")"; then return 1; fi
    if [[ $MODE == venv && -n $PYTHON_WANTED ]]; then
        local wanted
        REASON="$PYTHON_WANTED does not run"
        wanted="$(python_version "$PYTHON_WANTED")" || return 1
        REASON="it has Python $ENV_VERSION, and $wanted is wanted"
        if [[ ${wanted%.*} != "${ENV_VERSION%.*}" ]]; then return 1; fi
    fi
    REASON="$(state check)"
}

set_up() {
    step "Checking Python, the compiler and the disk"
    if [[ $MODE == current ]]; then
        check_current_env
    elif [[ -z $PYTHON_WANTED ]] && env_alive; then
        # Goes on with the environment as it is.
        BASE_PYTHON=$ENV_PYTHON BASE_VERSION=$ENV_VERSION
    else
        choose_python
    fi
    check_room
    if ! any_cached_wheel; then check_compiler "$BASE_PYTHON"; fi

    if [[ $MODE == current ]]; then
        step "Using the active environment $ENV_DIR (Python $BASE_VERSION)"
        check_clashes
        mkdir -p "$STATE_DIR"
        forget_broken_packages
    else
        create_venv
    fi
    # From here on it is not complete any more.
    rm -f "$STAMP"
    : >"$LOG"
    install_torch
    install_lock
    install_mmcv
    install_package
    state write "$OPS_INSTALLED"
}

main() {
    parse_args "$@"
    # Nothing of the caller's Python set-up may leak into the environment, or
    # make pip install elsewhere.
    unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX
    export PYTHONNOUSERSITE=1
    if [[ $PYTHON_WANTED == */* ]]; then
        PYTHON_WANTED="$(absolute "$PYTHON_WANTED")"
    fi
    CACHE="$(absolute "$CACHE")"
    # Python looks for packages in the current folder first: be where none is.
    cd /
    locate_env
    if env_ready; then
        log "Environment: $ENV_PYTHON (Python $ENV_VERSION), complete."
    else
        trap cleanup EXIT
        trap 'exit 130' INT
        trap 'exit 143' TERM
        take_lock
        # Another set-up may have done it while this one waited.
        if ! env_ready; then
            log "Setting up $ENV_DIR: $REASON"
            set_up
            log "Done in $(minutes "$SECONDS"): $ENV_PYTHON"
            if [[ $MODE == venv && $PRINT_PYTHON == 0 ]]; then
                log "Activate it: source $ENV_DIR/bin/activate"
            fi
        fi
    fi
    if ((PRINT_PYTHON)); then printf '%s\n' "$ENV_PYTHON"; fi
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    main "$@"
fi
