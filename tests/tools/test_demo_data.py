# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The images of the demo: tiles to learn from, scenes to be scored on."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DefaultScope
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
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file()
    }


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Small scenes, written by a process of its own."""
    folder = tmp_path_factory.mktemp('demo') / 'scenes'
    subprocess.run(
        [sys.executable, DEMO / 'make_scenes.py', folder, *OPTIONS], check=True
    )
    return folder


@pytest.fixture(scope='module')
def scenes():
    """The same scenes before they are written."""
    return {
        split: [Garden(split, 96).compose(i, 0) for i in range(count)]
        for split, count in COUNTS.items()
    }


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
        monkeypatch.setitem(
            PHOTOGRAPHS, name, Photograph(lambda x=pixels: x, 'none', 50, 0.9)
        )
    monkeypatch.setattr(
        make_scenes,
        'cut_coins',
        lambda image: [(image[:20, :20], np.ones((20, 20), bool))],
    )
    monkeypatch.setattr(make_scenes, 'BRIGHTNESS', (1, 1))
    monkeypatch.setattr(make_scenes, 'SHADOW', 1)
    return values


class TestRegions:
    @pytest.mark.parametrize(
        'size', [(300, 200), (200, 300), (64, 64), (451, 300), (3, 2)]
    )
    @pytest.mark.parametrize('border', [0, 1])
    def test_no_pixel_is_shared_or_lost(self, size, border, monkeypatch):
        width, height = size
        pixels = np.arange(width * height * 3) // 3
        pixels = np.stack([pixels >> 16, pixels >> 8, pixels], 1) & 255
        pixels = pixels.astype(np.uint8)[::3].reshape(height, width, 3)
        monkeypatch.setitem(
            PHOTOGRAPHS,
            'cat',
            Photograph(lambda: pixels, 'none', border=border),
        )
        parts = [np.asarray(photographs.load_region('cat', x)) for x in SPLITS]
        whole = np.concatenate(parts, axis=int(width > height))
        inner = pixels[border : height - border, border : width - border]
        assert np.array_equal(whole, inner)

    def test_both_are_large_enough_for_a_tile(self):
        for name in PHOTOGRAPHS:
            for split in SPLITS:
                assert min(photographs.load_region(name, split).size) > 96

    def test_boxes_are_inside(self):
        for photograph, *boxes in SOURCES.values():
            for split, box in zip(SPLITS, boxes):
                width, height = photographs.load_region(photograph, split).size
                left, top, right, bottom = box or (0, 0, width, height)
                assert 0 <= left < right <= width
                assert 0 <= top < bottom <= height

    def test_scenes_keep_to_their_split_and_masks_are_exact(self, flat):
        for split in SPLITS:
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
            away = (
                np.asarray(Image.open(tile)).astype(int)
                - flat[tile.parent.name]['train']
            )
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

    def test_all_classes_in_both_splits(self, scenes):
        for split in scenes.values():
            shares = np.mean(
                [
                    np.bincount(scene.labels.ravel(), minlength=len(COLORS))
                    / scene.labels.size
                    for scene in split
                ],
                0,
            )
            assert len(shares) == len(COLORS) and min(shares) > 0.01

    def test_splits_numbers_and_seeds_differ(self, scenes):
        labels = [x.labels for split in scenes.values() for x in split]
        labels.append(Garden('train', 96).compose(0, 1).labels)
        assert len({x.tobytes() for x in labels}) == len(labels)


@pytest.mark.parametrize('split', COUNTS)
class TestLayout:
    """What the files say is what the scenes hold."""

    def test_files(self, written, scenes, split):
        root = written / 'VOCdevkit/VOC2012'
        names = (root / f'ImageSets/Segmentation/{split}.txt').read_text()
        assert names.split() == [scene.name for scene in scenes[split]]
        assert (root / 'class_names.txt').read_text().split() == list(CLASSES)
        for scene in scenes[split]:
            mask = Image.open(root / f'SegmentationClass/{scene.name}.png')
            assert mask.mode == 'P' and np.array_equal(mask, scene.labels)
            image = Image.open(root / f'JPEGImages/{scene.name}.jpg')
            away = np.asarray(image) - scene.image[..., None].astype(int)
            assert image.mode == 'RGB' and abs(away).mean() < 3

    def test_mmseg_loads_it(self, written, scenes, split):
        segmentation = pytest.importorskip('mmseg.datasets')
        # Whatever scope an earlier test left behind.
        with DefaultScope.overwrite_default_scope('mmseg'):
            dataset = segmentation.PascalVOCDataset(
                data_root=str(written / 'VOCdevkit/VOC2012'),
                ann_file=f'ImageSets/Segmentation/{split}.txt',
                data_prefix=dict(
                    img_path='JPEGImages', seg_map_path='SegmentationClass'
                ),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations'),
                ],
            )
        assert len(dataset) == COUNTS[split]
        for scene, item in zip(scenes[split], dataset):
            assert item['img'].shape == (96, 96, 3)
            assert np.array_equal(item['gt_seg_map'], scene.labels)


class TestFolders:
    def test_same_again(self, written, tmp_path, monkeypatch, capsys):
        folder = tmp_path / 'scenes'
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert content(folder) == content(written)
        assert 'overview.png' in capsys.readouterr().out
        (folder / 'overview.png').unlink()  # would come back
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert 'are there already' in capsys.readouterr().out
        assert not (folder / 'overview.png').exists()
        assert [x.name for x in tmp_path.iterdir()] == ['scenes']

    def test_other_options_replace(self, written, tmp_path, monkeypatch):
        folder = tmp_path / 'scenes'
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        start(
            monkeypatch,
            make_scenes,
            folder,
            '--train',
            2,
            '--val',
            2,
            '--size',
            96,
            '--seed',
            1,
        )
        images = sorted(folder.rglob('*.jpg'))
        assert [x.stem for x in images] == [
            'train_0000',
            'train_0001',
            'val_0000',
            'val_0001',
        ]
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
            patch.setattr(make_scenes, 'draw_overview', interrupt)
            with pytest.raises(KeyboardInterrupt):
                start(patch, make_scenes, folder, *OPTIONS)
        assert not folder.exists()
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert content(folder) == content(written)
        assert [x.name for x in tmp_path.iterdir()] == ['scenes']

    def test_tiles_of_an_older_version_go(
        self, flat, tmp_path, monkeypatch, capsys
    ):
        folder = tmp_path / 'tiles'
        (folder / 'brick').mkdir(parents=True)
        (folder / 'brick/old.png').write_bytes(b'old')
        (folder / 'LICENSES.txt').write_text('Tiles of 160 px every 100 px.\n')
        start(monkeypatch, make_tiles, folder)
        assert not (folder / 'brick/old.png').exists()
        stamp, *lines = (folder / 'LICENSES.txt').read_text().splitlines()
        assert '96 px every 32 px' in stamp
        assert [x.split(':')[0] for x in lines] == list(PHOTOGRAPHS)
        start(monkeypatch, make_tiles, folder)
        assert 'are there already' in capsys.readouterr().out

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
