# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What documents name exists."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

DOCUMENTS = [
    *ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md'),
    ROOT / 'configs/benchmarks/README.md'
]


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda p: p.name)
def test_what_a_document_names_exists(path):
    text = path.read_text()
    links = re.findall(r'\]\((?!https?://)([^)#]+)', text)
    files = re.findall(r'(?<![\w/.])(?:tools|configs|tests)/[\w./-]*\.\w+',
                       text)
    missing = [
        *(x for x in links if not (path.parent / x).exists()),
        *(x for x in files if not (ROOT / x).exists())
    ]
    assert not missing


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
        if 'measure.make_parser' in source:
            source += (ROOT / 'tools/benchmarks/measure.py').read_text()
        elif 'make_parser' in source:
            source += (ROOT / 'mmdensecl/engine/command_line.py').read_text()
        tools[tool] = source
        for flag in re.findall(r'(?<=\s)--[a-z][\w-]*', line):
            assert f"'{flag}'" in source, f'{document}: {line}'
    assert {'tools/train.py', 'tools/benchmark.py'} <= set(tools)
