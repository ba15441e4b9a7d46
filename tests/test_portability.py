# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tests that what is imported, and every file, is fit for Windows and macOS.

They run on Linux: our modules, and ours alone, do not find what only POSIX has
in a child process.
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

from mmdensecl.engine import command_line

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / 'setup.py']
for folder in ('mmdensecl', 'tools', 'configs'):
    SOURCES += sorted((ROOT / folder).rglob('*.py'))

# Imports all that it is told as Windows would, as far as our own modules see.
CHILD = """
import builtins, importlib, pkgutil, runpy, sys
from pathlib import Path

ROOT = Path(sys.argv[1])
MISSING = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty',
           'posix', 'syslog', 'crypt', 'nis', 'spwd'}
real_import = builtins.__import__


def windows_import(name, globals=None, locals=None, fromlist=(), level=0):
    # The module's name, or a script's, which is run below.
    who = (globals or {}).get('__name__') or ''
    ours = who.split('.')[0] in ('mmdensecl', 'ours')
    if ours and not level and name.split('.')[0] in MISSING:
        raise ModuleNotFoundError(f'No module named {name!r} (POSIX only)')
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
"""


@pytest.mark.slow
def test_imports_without_posix(tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg'}
    process = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CHILD, str(ROOT)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        encoding='utf-8',
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    ours = [x for x in SOURCES if 'configs' not in x.parts]
    count = int(process.stdout.split()[-1])
    # Modules that need a host that is not here are left out.
    assert count > 0.9 * len(ours)


def lacks_encoding(node):
    """Whether a call opens text by its path and names no encoding."""
    if not isinstance(node, ast.Call) or any(
        x.arg in ('encoding', 'fileobj', None) for x in node.keywords
    ):
        return False
    if isinstance(node.func, ast.Attribute):
        number = dict(read_text=0, write_text=1).get(node.func.attr)
        return number is not None and len(node.args) <= number
    named = (x.value for x in node.keywords if x.arg == 'mode')
    mode = [*node.args[1:2], *named]
    binary = mode and 'b' in str(getattr(mode[0], 'value', ''))
    return getattr(node.func, 'id', '') == 'open' and not binary


def test_text_files_name_their_encoding():
    found = [
        f'{path.relative_to(ROOT)}:{node.lineno}'
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
        if lacks_encoding(node)
    ]
    assert not found, f'no encoding is named in {found}'
    calls = ["open('a', 'w')", 'p.read_text()', "open('a', 'rb')", 'p.open()']
    found = [lacks_encoding(ast.parse(x, mode='eval').body) for x in calls]
    assert found == [True, True, False, False]


def test_names_that_windows_allows():
    reserved = re.compile(
        r'(con|prn|aux|nul|com\d|lpt\d)(\..*)?$|.*[<>:"|?*\\\x00-\x1f]|'
        r'.*[. ]$',
        re.IGNORECASE,
    )
    folders = 'mmdensecl', 'tools', 'configs', 'tests', 'docs'
    paths = [
        *ROOT.iterdir(),
        *(y for x in folders for y in (ROOT / x).rglob('*')),
    ]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    assert len(names) > 200
    assert not [x for x in names if reserved.match(x.rpartition('/')[2])]
    # Windows and macOS take them for one file.
    assert len({x.casefold() for x in names}) == len(names)
    # 260 characters, the folder of a user and of the package included.
    assert not [x for x in names if len(x) > 150]
    # Need a privilege on Windows, and become text files in a checkout.
    ours = [x for x in paths if not x.name.startswith('.')]
    assert not [str(path) for path in ours if path.is_symlink()]


def test_work_dir_of_a_config_on_windows(tmp_path, monkeypatch):
    config = tmp_path / 'my_config.py'
    config.write_text('model = dict()')
    from_file = command_line.Config.fromfile
    monkeypatch.setattr(command_line, 'osp', ntpath)
    monkeypatch.setattr(
        command_line.Config, 'fromfile', lambda path: from_file(config)
    )
    args = dict(launcher='none', cfg_options=[], data_root=None, local_rank=0)
    args.update(config=r'C:\configs\my_config.py', work_dir=None)
    work_dir = command_line.read_config(Namespace(**args)).work_dir
    assert PureWindowsPath(work_dir).parts == ('work_dirs', 'my_config')
