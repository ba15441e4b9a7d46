# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests of tools/env.sh, without a download.

The real script runs in a tree of its own, whose name has a space in it, with a
PATH that holds what a test puts there: stand-ins for uv, Python and compiler.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Neither uv nor Python nor a compiler.
COMMANDS = 'awk bash cp df dirname grep mkdir sed touch'
PYTHON = """echo "python $*" >> "$CALLS"
case "$*" in *sysconfig*) echo /include ;; esac"""
UV = """echo "uv $* cuda=${CUDA_VISIBLE_DEVICES-all}" >> "$CALLS"
case "$*" in
    *'python find'*) echo "$BIN/python3" ;;
    *'python list'*) echo cpython-3.13.0 ;;
    *sync*) mkdir -p "$ROOT/.venv/bin"
        cp "$BIN/python3" "$ROOT/.venv/bin/python" ;;
esac"""


class Tree:
    """A copy of what the script reads, and a PATH of its own."""

    def __init__(self, folder):
        self.root = folder / 'my tree'
        self.bin = folder / 'bin'
        self.calls = folder / 'calls'
        self.venv = self.root / '.venv'
        (self.root / 'tools').mkdir(parents=True)
        for name in ('tools/env.sh', 'pyproject.toml', 'uv.lock'):
            shutil.copy(ROOT / name, self.root / name)
        # The script compares times with the lock's.
        os.utime(self.root / 'uv.lock', (1, 1))
        self.bin.mkdir()
        for command in COMMANDS.split():
            (self.bin / command).symlink_to(shutil.which(command))
        self.script('python3', PYTHON)
        self.script('uv', UV)
        self.script('c++', '')

    def script(self, name, text):
        path = self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(f'#!/bin/sh\n{text}\n')
        path.chmod(0o755)

    def run(self, **env):
        """Return the exit status, `$python` and the messages."""
        self.calls.write_text('')
        env.update(PATH=str(self.bin), BIN=self.bin)
        result = subprocess.run(
            ['bash', '-c', '. "$0"; echo "$python"', 'my tree/tools/env.sh'],
            env=dict(env, ROOT=self.root, CALLS=self.calls),
            cwd=self.root.parent,
            text=True,
            capture_output=True,
            timeout=60,
        )
        return result.returncode, result.stdout.strip(), result.stderr

    def refused(self, *words, **env):
        """Run, and look for what a refusal says."""
        status, _, messages = self.run(**env)
        assert status == 1
        assert not [x for x in words if x not in messages], messages

    def called(self, word):
        return [x for x in self.calls.read_text().splitlines() if word in x]


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_sets_up_and_says_where_python_is(tree):
    assert tree.run() == (0, str(tree.venv / 'bin' / 'python'), '')
    (sync,) = tree.called('sync')
    assert '--locked' in sync and '--extra all' in sync
    assert tree.called('import mmcv.ops')


def test_an_environment_of_ones_own_is_used_as_it_is(tree):
    assert tree.run(MMDENSECL_PYTHON='/a/python') == (0, '/a/python', '')
    assert tree.calls.read_text() == ''


def test_uv_is_installed_where_there_is_none(tree):
    (tree.bin / 'uv').unlink()
    tree.script('made', UV)
    install = 'mkdir -p "$ROOT/.uv/bin" && cp "$BIN/made" "$ROOT/.uv/bin/uv"'
    tree.script('python3', f'{PYTHON}\n[ "$2" != pip ] || {{ {install}; }}')
    status, _, messages = tree.run()
    assert status == 0, messages
    (pip,) = tree.called('-m pip install')
    assert pip.endswith(f'--target {tree.root}/.uv uv>=0.13,<1')


@pytest.mark.parametrize(
    'env, wanted',
    [({}, 'Python 3.10, 3.11 or 3.12'), (dict(UV_PYTHON='3.9'), '3.9')],
)
def test_no_fitting_python(tree, env, wanted):
    tree.script('uv', UV.replace('echo "$BIN/python3"', 'exit 2'))
    tree.refused(f'{wanted} is not here', 'cpython-3.13.0', **env)
    assert not tree.called('sync')


def test_no_compiler(tree):
    (tree.bin / 'c++').unlink()
    tree.refused('c++ cannot', 'build-essential')
    assert not tree.called('sync')
    tree.script('my-c++', '')
    assert tree.run(CXX='my-c++ -O0')[0] == 0


@pytest.mark.parametrize('release, shown', [('13.1', 'all'), ('12.4', '')])
def test_cuda_ops_only_with_the_nvcc_of_torch(tree, release, shown):
    tree.script('nvcc', f'echo "Cuda tools, release {release}, V{release}.0"')
    assert tree.run()[0] == 0
    assert tree.called('sync')[0].endswith(f'cuda={shown}')
    (tree.bin / 'nvcc').unlink()
    assert tree.run()[0] == 0
    assert tree.called('sync')[0].endswith('cuda=')
