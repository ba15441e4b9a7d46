# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = (
    Path(__file__).parents[2]
    / 'tools'
    / 'dataset_converters'
    / 'coco_subset.py'
)

# Of 200 pictures by seed 0.
FIRST_DRAW = [
    38,
    52,
    87,
    129,
    234,
    262,
    430,
    521,
    563,
    689,
    752,
    878,
    913,
    1025,
    1067,
    1081,
    1193,
    1242,
    1263,
    1277,
]


def run(*arguments):
    return subprocess.run(
        [sys.executable, TOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
    )


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


class TestCocoSubset:
    def test_ten_percent(self, source):
        """Where the config looks for it, with every label of the share."""
        done = run(source)
        assert done.returncode == 0, done.stderr
        out = source.with_name('instances_train2017_10pct_seed0.json')
        assert '20 of 200 pictures' in done.stdout
        content, ids = read(out)
        whole, all_ids = read(source)
        assert len(ids) == len(set(ids)) == 20 and set(ids) <= set(all_ids)
        assert content['annotations'] == [
            x for x in whole['annotations'] if x['image_id'] in ids
        ]
        for key in ('categories', 'info'):
            assert content[key] == whole[key]
        # The draw itself: another one would be another benchmark.
        assert ids == FIRST_DRAW

    def test_seed_and_order(self, source, tmp_path):
        """The draw depends on the seed, not on the order of the file."""
        draws = []
        shuffled = write(tmp_path / 'reversed.json', reverse=True)
        for name, seed in ((source, 1), (shuffled, 1), (source, 2)):
            out = tmp_path / f'{len(draws)}.json'
            assert run(name, '--seed', seed, '--out', out).returncode == 0
            draws.append(set(read(out)[1]))
        assert draws[0] == draws[1] != draws[2]

    def test_shares_are_nested(self, source, tmp_path):
        draws = []
        for percent in (1, 5, 100):
            out = tmp_path / f'{percent}.json'
            assert (
                run(source, '--percent', percent, '--out', out).returncode == 0
            )
            draws.append(set(read(out)[1]))
        assert [len(x) for x in draws] == [2, 10, 200]
        assert draws[0] < draws[1] < draws[2]

    @pytest.mark.parametrize(
        'arguments, message',
        [
            (['--percent', '0'], 'above 0 and at most 100, got 0'),
            (['--percent', '101'], 'above 0 and at most 100, got 101'),
        ],
    )
    def test_bad_share(self, source, arguments, message):
        done = run(source, *arguments)
        assert done.returncode == 2 and message in done.stderr

    def test_bad_files(self, source, tmp_path):
        done = run(tmp_path / 'nowhere.json')
        assert done.returncode == 2 and 'there is no file' in done.stderr
        other = tmp_path / 'other.json'
        other.write_text('{}')
        done = run(other)
        assert done.returncode == 2 and 'has no images' in done.stderr
        assert run(source).returncode == 0
        done = run(source)
        assert done.returncode == 2 and 'exists already' in done.stderr
