# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What is imported, and every file, is fit for Windows and macOS."""

import ast
import ntpath
import re
from argparse import Namespace
from pathlib import Path, PureWindowsPath

from mmdensecl.engine import command_line

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / 'setup.py']
for folder in ('mmdensecl', 'tools', 'configs'):
    SOURCES += sorted((ROOT / folder).rglob('*.py'))

# What Windows lacks.
POSIX = {'fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty', 'posix'}


def needed_to_import(path):
    """The modules that a file cannot be imported without."""
    todo = [ast.parse(path.read_text(encoding='utf-8'))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (x.name.split('.')[0] for x in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split('.')[0]
        elif not isinstance(node, (ast.FunctionDef, ast.Try)):
            todo += ast.iter_child_nodes(node)


def test_imports_without_posix():
    needed = {str(path): {*needed_to_import(path)} for path in SOURCES}
    assert 'torch' in set.union(*needed.values())
    assert not [path for path, names in needed.items() if names & POSIX]


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
