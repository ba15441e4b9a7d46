# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The documents name what exists, stay short, and build."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdensecl import cli

ROOT = Path(__file__).parents[1]
README = ROOT / 'README.md'
SITE = sorted((ROOT / 'docs').glob('*.md'))
# A changelog also names what went.
CHANGELOG = ROOT / 'CHANGELOG.md'
DOCUMENTS = [
    README,
    ROOT / 'CONTRIBUTING.md',
    ROOT / 'configs/benchmarks/README.md',
    *SITE,
]
MAX_WORDS = 12_000  # of README.md and docs/, as `wc -w` counts
MAX_README_LINES = 200


def name_of(path):
    return str(path.relative_to(ROOT))


def anchors(path):
    """What links to a heading of a document may say after the #."""
    text = re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL)
    for heading in re.findall(r'^#+ (.*)$', text, re.MULTILINE):
        kept = re.sub(r'[^\w\- ]', '', heading.lower())
        yield kept.replace(' ', '-')


@pytest.mark.parametrize('path', [*DOCUMENTS, CHANGELOG], ids=name_of)
def test_links(path):
    missing = []
    text = path.read_text()
    for link in re.findall(r'\]\((?!https?://)([^)]+)\)', text):
        file, _, anchor = link.partition('#')
        target = (path.parent / file) if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize('path', DOCUMENTS, ids=name_of)
def test_files_that_are_named(path):
    folders = 'tools|configs|tests|mmdensecl|docs'
    files = re.findall(
        rf'(?<![\w/.])(?:{folders})/[\w./-]*\.(?:py|sh|md|yml)\b',
        path.read_text(),
    )
    assert not [x for x in files if not (ROOT / x).exists()]


CONFIG = r'\b(?:(?:densecl|mocov2|dsc_[kp]m|resnet50)_[\w-]*(?:\d+e|knn|voc07)'
CONFIG += r'|(?:faster|mask)-rcnn_r\d+\w*-|fcn_r\d+\w*-)[\w-]*'


@pytest.mark.parametrize('path', DOCUMENTS, ids=name_of)
def test_configs_that_are_named(path):
    """By their names alone, such as `densecl_r50_8xb32-coslr-200e`."""
    known = {x.stem for x in (ROOT / 'configs').rglob('*.py')}
    text = re.sub(r'mmseg::\S+|https?://\S+', '', path.read_text())
    names = set(re.findall(CONFIG, text))
    assert not names - known
    if path.name == 'pretraining.md':  # or this tests nothing
        assert 'dsc_km_r50_8xb32-coslr-200e' in names


def commands():
    """Every call of a Python tool with its flags, by document."""
    for path in DOCUMENTS:
        text = path.read_text().replace('\\\n', ' ')
        for block in re.findall(r'```bash\n(.*?)```', text, re.DOTALL):
            for line in block.splitlines():
                tool = re.search(r'tools/[\w/]+\.py', line.partition('#')[0])
                if tool:
                    yield path.name, tool.group(), line


def test_flags_of_commands_exist():
    tools = {}
    for document, tool, line in commands():
        source = (ROOT / tool).read_text()
        # Where the flags are that tools share.
        if 'measure.make_parser' in source:
            source += (ROOT / 'tools/benchmarks/measure.py').read_text()
        if 'engine.command_line' in source or 'make_parser' in source:
            source += (ROOT / 'mmdensecl/engine/command_line.py').read_text()
        tools[tool] = source
        for flag in re.findall(r'(?<=\s)--[a-z][\w-]*', line):
            assert f"'{flag}'" in source, f'{document}: {line}'
    assert {'tools/train.py', 'tools/benchmark.py'} <= set(tools)


def test_commands_of_ours_exist():
    """`mmdensecl pretrain ...` and its flags."""
    known = {
        flag
        for action in cli.make_parser()._actions
        for parser in (action.choices or {}).values()
        for own in parser._actions
        for flag in own.option_strings
    }
    found = set()
    for path in DOCUMENTS:
        for line in re.findall(r'^mmdensecl (.*)$', path.read_text(), re.M):
            name, *words = line.split()
            found.add(name)
            assert name in ('pretrain', *cli.TOOLS), line
            if name == 'pretrain':
                flags = {x for x in words if x.startswith('--')}
                assert flags <= known, line
    assert {'pretrain', 'probe'} <= found


def test_length():
    assert len(README.read_text().splitlines()) <= MAX_README_LINES
    words = {x.name: len(x.read_text().split()) for x in [README, *SITE]}
    assert sum(words.values()) <= MAX_WORDS, words


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    pytest.importorskip('sphinx', reason='pip install .[docs]')
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-E']
        + ['-d', str(tmp_path / 'doctrees'), 'docs', str(tmp_path / 'site')],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=600,
    )
    assert not done.returncode, done.stderr[-5000:]
    built = {x.stem for x in (tmp_path / 'site').glob('*.html')}
    assert {x.stem for x in SITE} <= built
    api = (tmp_path / 'site/api.html').read_text()
    assert 'id="mmdensecl.models.DenseCL"' in api
