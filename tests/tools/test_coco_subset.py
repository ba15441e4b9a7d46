# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import runpy
import sys

import pytest
from runs import TOOLS

TOOL = TOOLS / 'dataset_converters' / 'coco_subset.py'
# Of 200 pictures by seed 0.
FIRST_DRAW = (
    '38 52 87 129 234 262 430 521 563 689 752 878 913 1025 1067 1081 1193 '
    '1242 1263 1277'
)


@pytest.fixture
def run(monkeypatch, capsys):
    """Function that calls the tool: its exit status and what it said."""

    def run(*words):
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(TOOL), run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def write(path, count=200, reverse=False):
    ids = [7 * i + 3 for i in range(count)]
    content = dict(
        images=[dict(id=i, file_name=f'{i}.jpg') for i in ids],
        # Two for each picture but the first, which is empty.
        annotations=[
            dict(id=2 * i + k, image_id=i) for i in ids[1:] for k in (0, 1)
        ],
        categories=[dict(id=1, name='cat')],
        info=dict(year=2017),
    )
    if reverse:
        content['images'].reverse()
    path.write_text(json.dumps(content))
    return path


def read(path):
    content = json.loads(path.read_text())
    return content, [x['id'] for x in content['images']]


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / 'instances_train2017.json')


def test_ten_percent(source, run):
    """Where the config looks for it, with every label of the share."""
    code, said = run(source)
    assert code == 0 and '20 of 200 pictures' in said
    out = source.with_name('instances_train2017_10pct_seed0.json')
    content, ids = read(out)
    whole, _ = read(source)
    # The draw itself: another one would be another benchmark.
    assert ids == [int(x) for x in FIRST_DRAW.split()]
    assert content['annotations'] == [
        x for x in whole['annotations'] if x['image_id'] in ids
    ]
    for key in ('categories', 'info'):
        assert content[key] == whole[key]


def test_seed_order_and_nested_shares(source, tmp_path, run):
    """The draw depends on the seed, not on the order of the file."""
    shuffled = write(tmp_path / 'reversed.json', reverse=True)
    draws = []
    for name, seed, percent in (
        (source, 1, 10),
        (shuffled, 1, 10),
        (source, 2, 10),
        (source, 1, 1),
        (source, 1, 100),
    ):
        out = tmp_path / f'{len(draws)}.json'
        words = '--seed', seed, '--percent', percent, '--out', out
        assert run(name, *words)[0] == 0
        draws.append(set(read(out)[1]))
    assert draws[0] == draws[1] != draws[2]
    assert [len(x) for x in draws[2:]] == [20, 2, 200]
    assert draws[3] < draws[0] < draws[4]


def test_refused(source, tmp_path, run):
    other = tmp_path / 'other.json'
    other.write_text('{}')
    run(source)
    for words, message in (
        ([source, '--percent', 101], 'above 0 and at most 100, got 101'),
        ([tmp_path / 'nowhere.json'], 'there is no file'),
        ([other], 'has no images'),
        ([source], 'exists already'),
    ):
        code, said = run(*words)
        assert code == 2 and message in said
