# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The images of the demo: tiles to learn from, scenes to be scored on."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DEMO = Path(__file__).parents[2] / 'tools/demo'
sys.path.insert(0, str(DEMO))  # as Python does for a script there

import make_scenes  # noqa: E402
import make_tiles  # noqa: E402
import photographs  # noqa: E402
from make_scenes import CLASSES, COLORS, SOURCES, Garden  # noqa: E402
from photographs import PHOTOGRAPHS, SPLITS, Photograph  # noqa: E402

COUNTS = dict(train=9, val=7)
OPTIONS = ['--train', '9', '--val', '7', '--size', '96']


def start(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, 'argv', [tool.__file__, *map(str, args)])
    tool.main()


def content(folder):
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Small scenes, written by a process of its own."""
    folder = tmp_path_factory.mktemp('demo') / 'scenes'
    command = [sys.executable, DEMO / 'make_scenes.py', folder, *OPTIONS]
    subprocess.run(command, check=True)
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
    @pytest.mark.parametrize('size', [(300, 200), (200, 300), (64, 64)])
    @pytest.mark.parametrize('border', [0, 1])
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

    def test_all_are_large_enough(self):
        for name in PHOTOGRAPHS:
            for split in SPLITS:
                assert min(photographs.load_region(name, split).size) > 96
        for photograph, *boxes in SOURCES.values():
            for split, box in zip(SPLITS, boxes, strict=True):
                width, height = photographs.load_region(photograph, split).size
                left, top, right, bottom = box or (0, 0, width, height)
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height

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


class TestScenes:
    @pytest.mark.parametrize('split, count', [('train', 15), ('val', 7)])
    def test_coins_are_whole_and_round(self, split, count):
        coins = Garden(split, 96).coins
        assert len(coins) == count
        for pixels, mask in coins:
            assert pixels.shape == mask.shape
            assert 0.65 < mask.mean() < 0.85  # pi / 4 is 0.785
            assert 0.8 < len(mask) / len(mask[0]) < 1.25

    def test_splits_numbers_and_seeds_differ(self):
        drawn = [(x, n, 0) for x in SPLITS for n in range(3)]
        drawn.append(('train', 0, 1))
        scenes = {
            Garden(split, 96).compose(number, seed).labels.tobytes()
            for split, number, seed in drawn
        }
        assert len(scenes) == len(drawn)

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


class TestFolders:
    def test_same_again(self, written, tmp_path, monkeypatch, capsys):
        folder = tmp_path / 'scenes'
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert content(folder) == content(written)
        capsys.readouterr()
        lists = folder / 'VOCdevkit/VOC2012/class_names.txt'
        lists.unlink()  # would come back
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert 'are there already' in capsys.readouterr().out
        assert not lists.exists()

    def test_other_options_replace(self, written, tmp_path, monkeypatch):
        folder = tmp_path / 'scenes'
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        others = '--train', 2, '--val', 2, '--size', 96, '--seed', 1
        start(monkeypatch, make_scenes, folder, *others)
        images = sorted(folder.rglob('*.jpg'))
        assert len(images) == 4
        for image in images:
            old = written / image.relative_to(folder)
            assert image.read_bytes() != old.read_bytes()

    def test_licences(self, written):
        lines = (written / 'LICENSES.txt').read_text().splitlines()
        assert '96 px' in lines[0] and 'seed 0' in lines[0]
        assert [x.split(':')[0] for x in lines[1:]] == list(COLORS)
        for line in lines[1:]:
            photograph = SOURCES[line.split(':')[0]][0]
            assert line.endswith(PHOTOGRAPHS[photograph].licence)

    def test_interrupted(self, written, tmp_path, monkeypatch):
        folder = tmp_path / 'scenes'

        def interrupt(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(make_scenes, 'write_voc', interrupt)
            with pytest.raises(KeyboardInterrupt):
                start(patch, make_scenes, folder, *OPTIONS)
        assert not folder.exists()
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert content(folder) == content(written)
        assert [x.name for x in tmp_path.iterdir()] == ['scenes']

    def test_tiles_of_an_older_version_go(self, flat, tmp_path, monkeypatch):
        folder = tmp_path / 'tiles'
        (folder / 'brick').mkdir(parents=True)
        (folder / 'brick/old.png').write_bytes(b'old')
        (folder / 'LICENSES.txt').write_text('Tiles of 160 px every 100 px.\n')
        start(monkeypatch, make_tiles, folder)
        assert not (folder / 'brick/old.png').exists()
        lines = (folder / 'LICENSES.txt').read_text().splitlines()
        assert [x.split(':')[0] for x in lines[1:]] == list(PHOTOGRAPHS)

    @pytest.mark.parametrize('tool', [make_scenes, make_tiles])
    @pytest.mark.parametrize('name', ['mine.png', 'LICENSES.txt'])
    def test_the_users_own_folder_stays(
        self, tool, name, tmp_path, monkeypatch
    ):
        (tmp_path / 'own').mkdir()
        (tmp_path / 'own' / name).write_text('My own.\n')
        with pytest.raises(FileExistsError, match='name another folder'):
            start(monkeypatch, tool, tmp_path / 'own')
        assert (tmp_path / 'own' / name).read_text() == 'My own.\n'
        assert [x.name for x in tmp_path.iterdir()] == ['own']

    @pytest.mark.parametrize(
        'option',
        [('--size', 63), ('--val', 0), ('--train', 0), ('--seed', -1)],
    )
    def test_wrong_options(self, option, tmp_path, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            start(monkeypatch, make_scenes, tmp_path / 'x', *option)
        assert ' '.join(map(str, option)) in capsys.readouterr().err
        assert not (tmp_path / 'x').exists()
