# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The pictures of the demo: tiles to learn from, scenes to be scored on."""
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools import mask as coco_mask

DEMO = Path(__file__).parents[2] / 'tools/demo'
sys.path.insert(0, str(DEMO))  # as Python does for a script there

import make_scenes  # noqa: E402
import make_tiles  # noqa: E402
import photographs  # noqa: E402
from make_scenes import CLASSES, GROUNDS  # noqa: E402

COUNTS = dict(train=9, val=7)
OPTIONS = ['--train', '9', '--val', '7', '--size', '96']
RED, BLUE = 0, 2


def start(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, 'argv', [tool.__file__, *map(str, args)])
    tool.main()


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob('*') if path.is_file()
    }


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """Small scenes, written by a process of its own."""
    folder = tmp_path_factory.mktemp('demo') / 'scenes'
    subprocess.run([sys.executable, DEMO / 'make_scenes.py', folder, *OPTIONS],
                   check=True)
    return folder


@pytest.fixture(scope='module')
def scenes():
    """The same scenes before they are written."""
    return {
        split: [
            make_scenes.to_grey(x)
            for x in make_scenes.compose_split(split, count, 96, 0)
        ]
        for split, count in COUNTS.items()
    }


@pytest.fixture(params=['wide', 'tall'])
def marked(request, monkeypatch):
    """Flat photographs: red to learn from, blue for scoring."""
    values = {}
    for number, name in enumerate(photographs.PHOTOGRAPHS):
        pixels = np.zeros((600, 360, 3), dtype=np.uint8)
        values[name] = 10 * number + 20
        pixels[:390, :, RED] = pixels[390:, :, BLUE] = values[name]
        if request.param == 'wide':
            pixels = pixels.transpose(1, 0, 2)
        monkeypatch.setitem(
            photographs.PHOTOGRAPHS, name,
            photographs.Photograph(lambda x=pixels: x, 'none', 0.7))
    monkeypatch.setattr(make_scenes, 'BRIGHTNESS_PERCENT', (100, 100))
    return values


class TestRegions:

    @pytest.mark.parametrize('size', [(300, 200), (200, 300), (64, 64),
                                      (451, 300), (3, 2)])
    def test_no_pixel_is_shared_or_lost(self, size):
        seen = np.zeros(size[::-1], dtype=int)
        for split in ('train', 'val'):
            left, top, right, bottom = photographs.region_box(*size, split)
            seen[top:bottom, left:right] += 1
        assert (seen == 1).all()

    @pytest.mark.parametrize('size', [(300, 200), (200, 300), (512, 512)])
    def test_the_longer_side_is_cut(self, size):
        left, top, right, bottom = photographs.region_box(*size, 'train')
        shares = sorted([(right - left) / size[0], (bottom - top) / size[1]])
        assert 0.6 < shares[0] < 0.7 and shares[1] == 1
        cut, whole = (right, bottom) if size[0] >= size[1] else (bottom, right)
        assert cut < max(size) and whole == min(size)

    def test_both_are_large_enough_for_a_scene(self):
        for name in CLASSES + GROUNDS:
            for split in ('train', 'val'):
                assert min(photographs.load_region(name, split).size) > 128

    def test_scenes_keep_to_their_split(self, marked):
        for split, own, other in (('train', RED, BLUE), ('val', BLUE, RED)):
            for scene in make_scenes.compose_split(split, 20, 96, 0):
                assert scene.image[..., own].min() > 0
                assert not scene.image[..., other].any()

    def test_tiles_are_of_the_training_regions(self, marked, tmp_path):
        make_tiles.write_tiles(tmp_path, 160, 70)
        tiles = list(tmp_path.rglob('*.png'))
        assert {tile.parent.name for tile in tiles} == set(marked)
        for tile in tiles:
            pixels = np.asarray(Image.open(tile))
            assert (pixels[..., RED] == marked[tile.parent.name]).all()
            assert not pixels[..., BLUE].any()


class TestScenes:

    def test_no_colour(self, scenes):
        for scene in scenes['train'] + scenes['val']:
            red, green, blue = scene.image.transpose(2, 0, 1)
            assert (red == green).all() and (red == blue).all()
            assert red.std() > 5

    def test_masks_are_exact(self, marked):
        objects = 0
        for scene in make_scenes.compose_split('train', 20, 96, 0):
            red = scene.image[..., RED]
            ground = np.unique(red[scene.owner == 0])
            assert ground.tolist() in [[marked[name]] for name in GROUNDS]
            for label, mask in scene.objects():
                assert (red[mask] == marked[CLASSES[label]]).all()
                objects += 1
        assert objects > 30

    def test_objects_vary_and_stay_visible(self, scenes):
        every = [s for split in scenes.values() for s in split]
        counts = {len(scene.labels) for scene in every}
        assert len(counts) > 2 and 1 <= min(counts) and max(counts) <= 6
        areas = [mask.sum() for s in every for _, mask in s.objects()]
        assert min(areas) > 60 and max(areas) > 5 * min(areas)

    def test_all_classes_in_both_splits(self, scenes):
        for split in scenes.values():
            labels = {label for scene in split for label in scene.labels}
            assert labels == set(range(len(CLASSES)))

    def test_splits_and_seeds_differ(self, scenes):
        assert not np.array_equal(scenes['train'][0].owner,
                                  scenes['val'][0].owner)
        other = make_scenes.compose_split('train', 1, 96, 1)[0]
        assert not np.array_equal(other.image, scenes['train'][0].image)

    def test_more_scenes_begin_with_the_same(self, scenes):
        few = make_scenes.compose_split('val', 3, 96, 0)
        for scene, same in zip(few, scenes['val']):
            scene = make_scenes.to_grey(scene)
            assert np.array_equal(scene.image, same.image)
            assert np.array_equal(scene.owner, same.owner)


def boxes_of(scene):
    """Of the visible parts: left, top, and the last column and row."""
    boxes = []
    for _, mask in scene.objects():
        rows, columns = np.nonzero(mask)
        boxes.append([columns.min(), rows.min(), columns.max(), rows.max()])
    return np.array(boxes)


def semantic_of(scene):
    """Union of the instances."""
    semantic = np.zeros(scene.owner.shape, dtype=int)
    for label, mask in scene.objects():
        semantic[mask] = label + 1
    return semantic


@pytest.mark.parametrize('split', COUNTS)
class TestLayouts:
    """What the files say is what the scenes hold."""

    def test_coco(self, written, scenes, split):
        data = json.loads(
            (written /
             f'coco/annotations/instances_{split}2017.json').read_text())
        names = {x['id']: x['name'] for x in data['categories']}
        assert list(names.values()) == list(CLASSES)
        assert len(data['images']) == COUNTS[split]
        for scene, image in zip(scenes[split], data['images']):
            assert image['file_name'] == f'{scene.name}.jpg'
            assert (image['width'], image['height']) == (96, 96)
            found = [
                x for x in data['annotations'] if x['image_id'] == image['id']
            ]
            assert [names[x['category_id']] for x in found
                    ] == [CLASSES[label] for label in scene.labels]
            for x, box, (_, mask) in zip(found, boxes_of(scene),
                                         scene.objects()):
                assert np.array_equal(
                    coco_mask.decode(x['segmentation']), mask)
                assert x['area'] == mask.sum() and x['iscrowd'] == 0
                size = box[2:] - box[:2] + 1
                assert x['bbox'] == [*box[:2], *size]
        ids = [x['id'] for x in data['annotations']]
        assert ids == list(range(1, len(ids) + 1))

    def test_voc(self, written, scenes, split):
        root = written / 'VOCdevkit/VOC2012'
        for task in ('Main', 'Segmentation'):
            lists = {
                path.stem: path.read_text().split()
                for path in (root / 'ImageSets' / task).iterdir()
            }
            assert lists[split] == [scene.name for scene in scenes[split]]
            assert lists['trainval'] == lists['train'] + lists['val']
            assert lists['test'] == lists['val'] and len(lists) == 4
        assert (root / 'class_names.txt').read_text().split() == list(CLASSES)
        for scene in scenes[split]:
            tree = ElementTree.parse(root / f'Annotations/{scene.name}.xml')
            found = tree.findall('object')
            assert [x.find('name').text for x in found
                    ] == [CLASSES[label] for label in scene.labels]
            boxes = [[
                int(x.find(f'bndbox/{key}').text)
                for key in ('xmin', 'ymin', 'xmax', 'ymax')
            ] for x in found]
            assert np.array_equal(boxes, boxes_of(scene) + 1)
            size = [tree.find(f'size/{x}').text for x in ('width', 'height')]
            assert size == ['96', '96']
            semantic = Image.open(root / f'SegmentationClass/{scene.name}.png')
            assert np.array_equal(semantic, semantic_of(scene))
            # VOC's own colours: aeroplane, bird, tvmonitor
            palette = np.reshape(semantic.getpalette('RGB')[:63], (21, 3))
            assert palette[[0, 1, 3, 20]].tolist() == [[0, 0, 0], [128, 0, 0],
                                                       [128, 128, 0],
                                                       [0, 64, 128]]

    def test_cityscapes(self, written, scenes, split):
        root = written / 'cityscapes'
        names = (root / 'class_names.txt').read_text().split()
        assert names == ['ground', *CLASSES]
        for scene in scenes[split]:
            semantic = Image.open(root / f'gtFine/{split}/demo' /
                                  f'{scene.name}_gtFine_labelTrainIds.png')
            assert semantic.mode == 'L'
            assert np.array_equal(semantic, semantic_of(scene))

    def test_same_pixels_everywhere(self, written, scenes, split):
        for scene in scenes[split]:
            coco = written / f'coco/{split}2017/{scene.name}.jpg'
            voc = written / f'VOCdevkit/VOC2012/JPEGImages/{scene.name}.jpg'
            assert coco.read_bytes() == voc.read_bytes()
            street = Image.open(written /
                                f'cityscapes/leftImg8bit/{split}/demo' /
                                f'{scene.name}_leftImg8bit.png')
            pixels = np.asarray(Image.open(coco)).astype(int)
            assert np.array_equal(pixels, street)
            assert abs(pixels - scene.image).mean() < 4

    def test_mmdet_loads_it(self, written, scenes, split):
        from mmdet.datasets import CocoDataset, VOCDataset

        # Whatever scope an earlier test left behind.
        with DefaultScope.overwrite_default_scope('mmdet'):
            coco = CocoDataset(
                data_root=str(written / 'coco'),
                ann_file=f'annotations/instances_{split}2017.json',
                data_prefix=dict(img=f'{split}2017'),
                metainfo=dict(classes=CLASSES),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations', with_mask=True)
                ])
            voc = VOCDataset(
                data_root=str(written / 'VOCdevkit'),
                ann_file=f'VOC2012/ImageSets/Main/{split}.txt',
                data_prefix=dict(sub_data_root='VOC2012/'),
                metainfo=dict(classes=CLASSES),
                pipeline=[
                    dict(type='LoadImageFromFile'),
                    dict(type='LoadAnnotations')
                ])
        assert len(coco) == len(voc) == COUNTS[split]
        for scene, one, two in zip(scenes[split], coco, voc):
            assert np.array_equal(one['img'], two['img'])
            boxes = boxes_of(scene)
            # COCO's right and bottom are outside; VOC's last ones inside.
            assert np.array_equal(one['gt_bboxes'].numpy(),
                                  boxes + [0, 0, 1, 1])
            assert np.array_equal(two['gt_bboxes'].numpy(), boxes)
            for item in (one, two):
                assert item['gt_bboxes_labels'].tolist() == scene.labels
                assert not item['gt_ignore_flags'].any()
            masks = [mask for _, mask in scene.objects()]
            assert np.array_equal(one['gt_masks'].masks, masks)

    def test_mmseg_loads_it(self, written, scenes, split):
        from mmseg.datasets import CityscapesDataset, PascalVOCDataset
        pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations')
        ]
        # Whatever scope an earlier test left behind.
        with DefaultScope.overwrite_default_scope('mmseg'):
            voc = PascalVOCDataset(
                data_root=str(written / 'VOCdevkit/VOC2012'),
                ann_file=f'ImageSets/Segmentation/{split}.txt',
                data_prefix=dict(
                    img_path='JPEGImages', seg_map_path='SegmentationClass'),
                pipeline=pipeline)
            streets = CityscapesDataset(
                data_root=str(written / 'cityscapes'),
                data_prefix=dict(
                    img_path=f'leftImg8bit/{split}',
                    seg_map_path=f'gtFine/{split}'),
                pipeline=pipeline)
        assert len(voc) == len(streets) == COUNTS[split]
        for scene, one, two in zip(scenes[split], voc, streets):
            for item in (one, two):
                assert item['img'].shape == (96, 96, 3)
                assert np.array_equal(item['gt_seg_map'], semantic_of(scene))


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
        start(monkeypatch, make_scenes, folder, '--train', 2, '--val', 2,
              '--size', 96, '--seed', 1)
        pictures = sorted((folder / 'coco').rglob('*.jpg'))
        assert [x.stem for x in pictures
                ] == ['train_0000', 'train_0001', 'val_0000', 'val_0001']
        for picture in pictures:
            old = written / picture.relative_to(folder)
            assert picture.read_bytes() != old.read_bytes()

    def test_licences(self, written):
        lines = (written / 'LICENSES.txt').read_text().splitlines()
        assert '96 px' in lines[0] and 'seed 0' in lines[0]
        assert [x.split(':')[0] for x in lines[1:]] == [*CLASSES, *GROUNDS]
        for line in lines[1:]:
            name = line.split(':')[0]
            assert line.endswith(photographs.PHOTOGRAPHS[name].licence)

    def test_interrupted(self, written, tmp_path, monkeypatch):
        folder = tmp_path / 'scenes'

        def interrupt(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(make_scenes, 'write_cityscapes', interrupt)
            with pytest.raises(KeyboardInterrupt):
                start(patch, make_scenes, folder, *OPTIONS)
        assert not folder.exists()
        start(monkeypatch, make_scenes, folder, *OPTIONS)
        assert content(folder) == content(written)
        assert [x.name for x in tmp_path.iterdir()] == ['scenes']

    def test_tiles_of_an_older_version_go(self, marked, tmp_path, monkeypatch):
        folder = tmp_path / 'tiles'
        (folder / 'brick').mkdir(parents=True)
        (folder / 'brick/old.png').write_bytes(b'old')
        (folder / 'LICENSES.txt').write_text('Tiles of 160 px every 100 px.\n')
        start(monkeypatch, make_tiles, folder)
        assert not (folder / 'brick/old.png').exists()
        stamp = (folder / 'LICENSES.txt').read_text().splitlines()[0]
        assert '160 px every 70 px' in stamp

    @pytest.mark.parametrize('tool', [make_scenes, make_tiles])
    @pytest.mark.parametrize('name', ['mine.png', 'LICENSES.txt'])
    def test_the_users_own_folder_stays(self, tool, name, tmp_path,
                                        monkeypatch):
        (tmp_path / 'own').mkdir()
        (tmp_path / 'own' / name).write_text('My own.\n')
        with pytest.raises(FileExistsError, match='name another folder'):
            start(monkeypatch, tool, tmp_path / 'own')
        assert (tmp_path / 'own' / name).read_text() == 'My own.\n'
        assert [x.name for x in tmp_path.iterdir()] == ['own']

    @pytest.mark.parametrize('option', [('--size', 63), ('--val', 0),
                                        ('--train', 0), ('--seed', -1)])
    def test_wrong_options(self, option, tmp_path, monkeypatch, capsys):
        with pytest.raises(SystemExit):
            start(monkeypatch, make_scenes, tmp_path / 'x', *option)
        assert ' '.join(map(str, option)) in capsys.readouterr().err
        assert not (tmp_path / 'x').exists()
