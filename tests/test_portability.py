# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests that what is imported, and every file, is fit for Windows and macOS.

They run on Linux: a system that lacks what only POSIX has is played to our
modules, and to ours alone, in a child process.
"""
import ast
import ntpath
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path, PureWindowsPath

import pytest

from mmdensecl.benchmark import runner
from mmdensecl.engine import command_line

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([
    ROOT / 'setup.py', *(ROOT / 'mmdensecl').rglob('*.py'),
    *(ROOT / 'tools').rglob('*.py'), *(ROOT / 'configs').rglob('*.py')
])

# Imports all that it is told as Windows would, as far as our own modules see.
CHILD = '''
import builtins, importlib, json, os, pkgutil, runpy, signal, sys, types
from pathlib import Path

ROOT = Path(sys.argv[1])
MISSING = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty',
           'posix', 'syslog', 'crypt', 'nis', 'spwd'}
# What os and signal have on Windows, by their documentation; of os only what
# is not missing there is too long a list.
NOT_IN_OS = """fork forkpty register_at_fork getuid geteuid getgid getegid
    getgroups getpgid getpgrp getsid setuid setgid setpgid setsid killpg nice
    wait wait3 wait4 waitid WIFEXITED WEXITSTATUS WNOHANG uname getloadavg
    sched_getaffinity sched_setaffinity sched_yield sysconf confstr mkfifo
    mknod chown fchown lchown chroot fchmod fchdir statvfs fstatvfs lockf
    sync fdatasync pread pwrite preadv pwritev readv writev sendfile pipe2
    posix_fadvise posix_fallocate posix_spawn memfd_create openpty ttyname
    O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_SYNC O_DSYNC O_NONBLOCK O_NOCTTY
    getxattr setxattr listxattr getresuid initgroups ctermid major minor
    tcgetpgrp tcsetpgrp""".split()
IN_SIGNAL = """SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN
    Signals Handlers signal getsignal default_int_handler raise_signal
    strsignal valid_signals set_wakeup_fd NSIG""".split()


def twin(module, names):
    other = types.ModuleType(module.__name__)
    other.__dict__.update({k: v for k, v in vars(module).items()
                           if k in names or k.startswith('__')})
    return other


OS = twin(os, set(vars(os)) - set(NOT_IN_OS))
OS.name = 'nt'
TWINS = dict(os=OS, signal=twin(signal, set(IN_SIGNAL)))
real_import = builtins.__import__


def windows_import(name, globals=None, locals=None, fromlist=(), level=0):
    # The module's name, or a script's, which is run below.
    who = (globals or {}).get('__name__') or ''
    ours = who.split('.')[0] in ('mmdensecl', 'ours')
    if ours and not level:
        if name.split('.')[0] in MISSING:
            raise ModuleNotFoundError(f'No module named {name!r} (POSIX only)')
        if name in TWINS:
            return TWINS[name]
        if name == 'os.path' and not fromlist:
            return OS
    return real_import(name, globals, locals, fromlist, level)


# Before ours, which must find them loaded: what others import is their affair.
import mmengine, mmpretrain.apis, torch, torchvision  # noqa: E401,F401
builtins.__import__ = windows_import

import mmdensecl

count = 0
names = [x.name for x in pkgutil.walk_packages(mmdensecl.__path__,
                                               'mmdensecl.')]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A host, or an optional package, that is not installed.
        if 'POSIX' in str(error) or error.name.startswith('mmdensecl'):
            raise
        print('without', error.name, name, file=sys.stderr)
        continue
    count += 1
for script in sorted((ROOT / 'tools').rglob('*.py')):
    sys.path.insert(0, str(script.parent))
    before = set(sys.modules)
    try:
        runpy.run_path(str(script), run_name='ours')
    except ModuleNotFoundError as error:
        if 'POSIX' in str(error):
            raise
    # Scripts of other folders have neighbours of the same name.
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], '__file__', None)
        if file and Path(file).parent == script.parent:
            del sys.modules[name]
    sys.path.pop(0)
    count += 1
print('fine', count)
'''


@pytest.mark.slow
def test_imports_without_posix(tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg'}
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CHILD,
         str(ROOT)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        encoding='utf-8',
        timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]
    ours = [x for x in SOURCES if 'configs' not in x.parts]
    count = int(process.stdout.split()[-1])
    # Modules that need a host that is not here are left out.
    assert count > 0.9 * len(ours)


def text_calls(path):
    """The calls in a source file that open text and name no encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Call):
            continue
        if any(x.arg in ('encoding', 'fileobj', None) for x in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if method else getattr(node.func, 'id', '')
        # Of open() the mode comes after the path.
        first = 1 if name == 'open' and not method else 0
        modes = [
            x.value for x in [
                *node.args[first:first + 1], *(k.value for k in node.keywords
                                               if k.arg == 'mode')
            ] if isinstance(x, ast.Constant) and isinstance(x.value, str)
        ]
        mode = modes[0] if modes else None
        if name == 'read_text':
            bad = not node.args
        elif name == 'write_text':
            bad = len(node.args) < 2
        elif name == 'open' and not method:
            bad = 'b' not in (mode or 'r')
        elif name == 'open':
            # Of a path: Image.open(path), tarfile.open(path, 'r:') and
            # os.open(path, flags) have no mode in the first place.
            bad = (not node.args and not node.keywords) or bool(
                mode and re.fullmatch('[rwaxt+]+', mode))
        elif name in ('NamedTemporaryFile', 'TemporaryFile'):
            bad = bool(mode) and 'b' not in mode
        else:
            continue
        if bad:
            yield f'{path.relative_to(ROOT)}:{node.lineno}'


def test_text_files_name_their_encoding():
    found = [x for path in SOURCES for x in text_calls(path)]
    assert not found, f'no encoding is named in {found}'


@pytest.mark.parametrize('code, found', [
    ("open('a')", True),
    ("open('a', 'w')", True),
    ("open('a', mode='w')", True),
    ("open('a', 'rb')", False),
    ("open('a', encoding='utf-8')", False),
    ("Path('a').open()", True),
    ("path.open('w')", True),
    ("path.open('wb')", False),
    ("Image.open(path)", False),
    ("tarfile.open(path, 'r:')", False),
    ("tarfile.open(fileobj=file, mode='w')", False),
    ("path.read_text()", True),
    ("path.read_text('utf-8')", False),
    ("path.write_text(x)", True),
    ("path.write_text(x, encoding='utf-8')", False),
    ("NamedTemporaryFile('w')", True),
    ("NamedTemporaryFile()", False),
])
def test_finds_a_missing_encoding(code, found, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
    path = tmp_path / 'module.py'
    path.write_text(code)
    assert bool(list(text_calls(path))) == found


def test_no_path_of_posix_in_the_code():
    """No /tmp, for example; /proc is looked for and may be missing."""
    found = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding='utf-8'))
        found += [
            f'{path.relative_to(ROOT)}:{node.lineno}: {node.value}'
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and re.match(r'/(tmp|dev|var|home|usr|etc|root)\b', node.value)
        ]
    assert not found


def all_files():
    skipped = re.compile(r'\.git$|\.venv|\.uv$|\.nox$|__pycache__|work_dirs$|'
                         r'build$|\.egg-info$|_cache$|data$')
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [x for x in folders if not skipped.search(x)]
        for name in [*folders, *files]:
            yield Path(folder, name)


def test_names_that_windows_allows():
    reserved = re.compile(
        r'(con|prn|aux|nul|com\d|lpt\d)(\..*)?$|.*[<>:"|?*\\\x00-\x1f]|'
        r'.*[. ]$', re.IGNORECASE)
    paths = list(all_files())
    assert len(paths) > 200
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    assert [x for x in names if reserved.match(x.rpartition('/')[2])] == []
    # Windows and macOS take them for one file.
    folded = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    assert [x for x in folded.values() if len(x) > 1] == []
    # 260 characters, the folder of a user and of the package included.
    assert [x for x in names if len(x) > 150] == []
    # Need a privilege on Windows, and become text files in a checkout.
    assert [str(path) for path in paths if path.is_symlink()] == []


class TestPathsOfWindows:

    def test_work_dir_of_a_config(self, tmp_path, monkeypatch):
        config = tmp_path / 'my_config.py'
        config.write_text('model = dict()')
        windows = r'C:\configs\my_config.py'
        from_file = command_line.Config.fromfile
        monkeypatch.setattr(command_line, 'osp', ntpath)
        monkeypatch.setattr(command_line.Config, 'fromfile',
                            lambda path: from_file(config))
        args = Namespace(
            config=windows,
            launcher='none',
            cfg_options=[],
            data_root=None,
            work_dir=None,
            local_rank=0)
        work_dir = command_line.read_config(args).work_dir
        assert PureWindowsPath(work_dir).parts == ('work_dirs', 'my_config')

    def test_benchmarks_say_that_they_need_posix(self, tmp_path, monkeypatch):
        monkeypatch.setattr(runner.os, 'name', 'nt')
        with pytest.raises(RuntimeError, match='Windows lacks.*WSL'):
            with runner.only_one(tmp_path):
                pass

    def test_cores_are_counted_everywhere(self, monkeypatch):
        assert runner.count_cores() == len(os.sched_getaffinity(0))
        monkeypatch.delattr(os, 'sched_getaffinity')
        assert runner.count_cores() == os.cpu_count()
