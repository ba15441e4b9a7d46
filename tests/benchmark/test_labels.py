# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Labels that cannot be scored stop a benchmark, with their counts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmdensecl.benchmark.labels import LabelError, check_labels

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')


def config(scope, train, val):
    """A config of two datasets, the first wrapped as hosts wrap them."""
    train = dict(type='ConcatDataset', datasets=[train])
    loaders = dict(train_dataloader=train, val_dataloader=val)
    loaders = {name: dict(dataset=node) for name, node in loaders.items()}
    return Config(dict(loaders, default_scope=scope))


def masks(path, train, val, classes=('background', 'thing'), **dataset):
    """Of mmseg, a mask for each split, given by its values."""
    nodes = []
    for split, values in dict(train=train, val=val).items():
        for name in (split, f'{split}_masks'):
            (path / name).mkdir(exist_ok=True)
        (path / split / '0.jpg').touch()
        array = np.array([values], np.uint8)
        Image.fromarray(array).save(path / f'{split}_masks/0.png')
        node = dict(type='BaseSegDataset', data_root=str(path), **dataset)
        node['metainfo'] = dict(classes=classes)
        prefix = dict(img_path=split, seg_map_path=f'{split}_masks')
        nodes.append(dict(node, data_prefix=prefix))
    return config('mmseg', *nodes)


def boxes(path, kind, train, val):
    """Of mmdet, with the classes person and dog and an object a name."""
    nodes = []
    for split, names in dict(train=train, val=val).items():
        node = dict(type='CocoDataset', ann_file=f'{split}.json')
        node['data_root'] = str(path)
        node['metainfo'] = dict(classes=('person', 'dog'))
        ids = {name: i for i, name in enumerate({*names})}
        content = dict(
            categories=[dict(id=i, name=x) for x, i in ids.items()],
            annotations=[dict(category_id=ids[x]) for x in names],
        )
        (path / f'{split}.json').write_text(json.dumps(content))
        if kind == 'voc':
            text = ''.join(f'<object><name>{x}</name></object>' for x in names)
            (path / 'Annotations').mkdir(exist_ok=True)
            file = path / f'Annotations/{split} 1.xml'
            file.write_text(f'<annotation>{text}</annotation>')
            (path / f'{split}.txt').write_text(f'{split} 1\n')
            node.update(type='VOCDataset', ann_file=f'{split}.txt')
            node['data_prefix'] = dict(sub_data_root='')
        nodes.append(node)
    return config('mmdet', *nodes)


def refused(cfg):
    """The message, and the rows of its counts."""
    with pytest.raises(LabelError) as error:
        check_labels(cfg)
    text = str(error.value)
    return text, [line.split() for line in text.splitlines()]


def test_binary_masks_of_0_and_255(tmp_path):
    """mmseg would say mIoU 100 of any model."""
    text, rows = refused(masks(tmp_path, [0, 0, 255], [0, 255, 255]))
    assert '"background" is the only class in val' in text
    assert '255 is ignored, was 1 meant?' in text
    assert ['background', '2', '1'] in rows and ['thing', '0', '0'] in rows
    assert ['?', 'not', 'scored', '1', '2'] in rows


def test_masks(tmp_path):
    text, _ = refused(masks(tmp_path, [0, 1, 7], [0, 1]))
    assert '"7" (1 pixels, as in' in text and 'train_masks/0.png' in text
    text, _ = refused(masks(tmp_path, [[255, 0, 0], [0, 0, 0]], [0, 1]))
    assert 'is a colour image' in text and '0 to 1' in text
    assert check_labels(masks(tmp_path, [0, 1, 255], [0, 1])) == []
    # 0 is not scored, 1 is the first class.
    shifted = masks(tmp_path, [0, 1, 2], [1, 2], reduce_zero_label=True)
    assert check_labels(shifted) == []
    names = ('background', 'road', 'tree', 'sky')
    assert check_labels(masks(tmp_path, [0, 1], [0, 1, 2], names)) == [
        '1 of 4 classes are not in val and not scored: sky',
        '1 scored, but not in train: tree',
    ]


@pytest.mark.parametrize('kind', ['coco', 'voc'])
def test_names(tmp_path, kind):
    # Another case: mmdet would say AP 0, without a word.
    cfg = boxes(tmp_path, kind, ['person', 'dog'], ['Person', 'dog'])
    text, rows = refused(cfg)
    assert '"Person" (1 objects, as in' in text
    assert 'is no class, "person" is' in text
    assert ['?', 'Person', '0', '1'] in rows
    # Names that are all unknown, and one instead of a class.
    text, _ = refused(boxes(tmp_path, kind, ['cat', 'cow'], ['cat']))
    assert 'train has not one label of a class' in text
    assert 'val has not one label of a class' in text and '"cow"' in text
    text, _ = refused(boxes(tmp_path, kind, ['person'], ['person', 'hound']))
    assert '"hound" (1 objects' in text and 'is no class' in text
    # A set of which some classes are of interest.
    names = ['person', 'dog', 'cat']
    (note,) = check_labels(boxes(tmp_path, kind, names, names))
    assert '"cat" (2 objects' in note and note.endswith('is no class')


def test_folders_of_images(tmp_path):
    """mmpretrain numbers the folders of each split for itself."""
    for name in ('train/cat', 'train/dog', 'val/cat', 'val/emu'):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / '0.jpg').touch()
    node = dict(type='CustomDataset', data_root=str(tmp_path))
    nodes = (dict(node, data_prefix=split) for split in ('train', 'val'))
    text, _ = refused(config('mmpretrain', *nodes))
    assert 'train has the classes cat, dog; val has cat, emu' in text


def test_no_run_starts(tmp_path, monkeypatch, capsys):
    """The tool itself, on a config of a user's own."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / 'tools')
    import benchmark

    cfg = masks(tmp_path, [0, 255], [0, 255])
    cfg.model = dict(type='X', backbone=dict(type='mmseg.ResNet', depth=18))
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
    cfg.val_evaluator = dict(type='IoUMetric')
    cfg.dump(tmp_path / 'mine.py')
    args = ['x', 'run', str(tmp_path / 'mine.py'), '--work-dir']
    monkeypatch.setattr(sys, 'argv', [*args, str(tmp_path / 'out')])
    assert benchmark.main() == 2
    assert 'cannot be scored' in capsys.readouterr().out
    assert not [*tmp_path.rglob('plan')]
