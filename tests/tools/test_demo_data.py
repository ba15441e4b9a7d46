# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The images of the demo: tiles to learn from, scenes to be scored on."""

import sys

import numpy as np
import pytest
from PIL import Image
from runs import TOOLS, tool

sys.path.insert(0, str(TOOLS / 'demo'))  # as Python does for a script there

import make_scenes  # noqa: E402
import make_tiles  # noqa: E402
import photographs  # noqa: E402
from make_scenes import CLASSES, COLORS, SOURCES, Garden  # noqa: E402
from photographs import PHOTOGRAPHS, SPLITS, Photograph  # noqa: E402

COUNTS = dict(train=9, val=7)
OPTIONS = '--train 9 --val 7 --size 96'


@pytest.fixture
def start(monkeypatch):
    """Function that calls a tool here."""

    def start(tool, folder, options=''):
        words = [tool.__file__, str(folder), *options.split()]
        monkeypatch.setattr(sys, 'argv', words)
        tool.main()

    return start


def content(folder):
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Small scenes, written by a process of its own."""
    folder = tmp_path_factory.mktemp('demo') / 'scenes'
    tool(f'demo/make_scenes.py {folder} {OPTIONS}', folder.parent)
    return folder


@pytest.fixture(params=['wide', 'tall'])
def flat(request, monkeypatch):
    """Flat photographs: each region has a grey of its own."""
    values = {}
    for number, name in enumerate(PHOTOGRAPHS):
        values[name] = dict(train=10 + 5 * number, val=140 + 5 * number)
        pixels = np.full((1010, 1000, 3), values[name]['val'], np.uint8)
        pixels[:505] = values[name]['train']
        if request.param == 'wide':
            pixels = pixels.transpose(1, 0, 2)
        photograph = Photograph(lambda x=pixels: x, 'none', 50, 0.9)
        monkeypatch.setitem(PHOTOGRAPHS, name, photograph)
    return values


class TestRegions:
    @pytest.mark.parametrize(
        'size, border', [((300, 200), 1), ((200, 300), 0)]
    )
    def test_no_pixel_is_shared_or_lost(self, size, border, monkeypatch):
        width, height = size
        pixels = np.arange(width * height * 3) // 3
        pixels = np.stack([pixels >> 16, pixels >> 8, pixels], 1) & 255
        pixels = pixels.astype(np.uint8)[::3].reshape(height, width, 3)
        cat = Photograph(lambda: pixels, 'none', border=border)
        monkeypatch.setitem(PHOTOGRAPHS, 'cat', cat)
        parts = [np.asarray(photographs.load_region('cat', x)) for x in SPLITS]
        whole = np.concatenate(parts, axis=int(width > height))
        inner = pixels[border : height - border, border : width - border]
        assert np.array_equal(whole, inner)

    @pytest.mark.parametrize('split', SPLITS)
    def test_scenes_keep_to_their_split_and_masks_are_exact(
        self, flat, split, monkeypatch
    ):
        coin = np.full((20, 20), flat['coins'][split], np.uint8)
        stamp = coin, np.ones((20, 20), bool)
        monkeypatch.setattr(make_scenes, 'cut_coins', lambda image: [stamp])
        monkeypatch.setattr(make_scenes, 'SHADOW', 1)
        # Neither brightness nor contrast is drawn anew.
        monkeypatch.setattr(make_scenes, 'relight', lambda pixels, rng: pixels)
        garden = Garden(split, 96)
        for number in range(20):
            scene = garden.compose(number, 0)
            for label, name in enumerate(COLORS):
                found = scene.image[scene.labels == label]
                assert (found == flat[SOURCES[name][0]][split]).all()

    def test_tiles_are_of_the_training_regions(self, flat, tmp_path):
        make_tiles.write_tiles(tmp_path, 96, 64)
        tiles = list(tmp_path.rglob('*.jpg'))
        assert {tile.parent.name for tile in tiles} == set(flat)
        for tile in tiles:
            own = flat[tile.parent.name]['train']
            away = np.asarray(Image.open(tile)).astype(int) - own
            assert abs(away).max() <= 1  # JPEG

    @pytest.mark.parametrize('split', SPLITS)
    def test_files_hold_the_scenes(self, written, split):
        root = written / 'VOCdevkit/VOC2012'
        assert (root / 'class_names.txt').read_text().split() == list(CLASSES)
        names = (root / f'ImageSets/Segmentation/{split}.txt').read_text()
        garden, shown = Garden(split, 96), set()
        for number in range(COUNTS[split]):
            scene = garden.compose(number, 0)
            assert names.split()[number] == scene.name
            mask = Image.open(root / f'SegmentationClass/{scene.name}.png')
            assert mask.mode == 'P' and np.array_equal(mask, scene.labels)
            image = Image.open(root / f'JPEGImages/{scene.name}.jpg')
            away = np.asarray(image) - scene.image[..., None].astype(int)
            assert image.mode == 'RGB' and abs(away).mean() < 3
            shown |= {*scene.labels.ravel()}
        assert len(names.split()) == COUNTS[split]
        assert shown == {*range(len(COLORS))}


def test_same_again_and_other_options(written, start, tmp_path, capsys):
    folder = tmp_path / 'scenes'
    start(make_scenes, folder, OPTIONS)
    assert content(folder) == content(written)
    capsys.readouterr()
    lists = folder / 'VOCdevkit/VOC2012/class_names.txt'
    lists.unlink()  # would come back
    start(make_scenes, folder, OPTIONS)
    assert 'are there already' in capsys.readouterr().out
    assert not lists.exists()
    # Others replace it.
    start(make_scenes, folder, '--train 2 --val 2 --size 96 --seed 1')
    images = sorted(folder.rglob('*.jpg'))
    assert len(images) == 4
    for image in images:
        old = written / image.relative_to(folder)
        assert image.read_bytes() != old.read_bytes()


@pytest.mark.parametrize(
    'tool, name', [(make_scenes, 'mine.png'), (make_tiles, 'LICENSES.txt')]
)
def test_the_users_own_folder_stays(tool, name, tmp_path, start):
    (tmp_path / 'own').mkdir()
    (tmp_path / 'own' / name).write_text('My own.\n')
    with pytest.raises(FileExistsError, match='name another folder'):
        start(tool, tmp_path / 'own')
    assert (tmp_path / 'own' / name).read_text() == 'My own.\n'
    assert [x.name for x in tmp_path.iterdir()] == ['own']
