# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The command, on small scenes whose classes are colours."""

import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from PIL import Image
from runs import TOOLS

from mmdensecl import load_backbone
from mmdensecl.evaluation.matching import compare, mean_accuracy, measure
from mmdensecl.registry import MODELS

COLOURS = ((90, 90, 90), (220, 40, 40), (40, 60, 220))


def write_scene(image, labels, rng):
    """A grey image with a red and a blue square."""
    mask = np.zeros((64, 64), np.uint8)
    for value in (1, 2):
        top, left = rng.integers(0, 32, 2)
        mask[top : top + 32, left : left + 32] = value
    pixels = np.array(COLOURS)[mask] + rng.integers(-20, 20, (64, 64, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(image)
    mask[:2] = 255
    palette = Image.fromarray(mask, 'P')
    palette.putpalette([*range(256)] * 3)
    palette.save(labels)


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    root = tmp_path_factory.mktemp('voc')
    folders = 'JPEGImages', 'SegmentationClass', 'ImageSets/Segmentation'
    images, masks, lists = (root / x for x in folders)
    for folder in (images, masks, lists):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 4)):
        names = [f'{split}{i}' for i in range(count)]
        (lists / f'{split}.txt').write_text('\n'.join(names))
        for name in names:
            write_scene(images / f'{name}.jpg', masks / f'{name}.png', rng)
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A ResNet-18 as initialised; what is told of it is random, too."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(dict(type='mmpretrain.ResNet', depth=18))
    model.init_weights()
    path = tmp_path_factory.mktemp('weights') / 'net.pth'
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS / 'analysis_tools'))
    monkeypatch.setenv('COLUMNS', '120')
    import dense_probe

    return dense_probe


@pytest.fixture
def call(tool, monkeypatch, capsys):
    """Function that gives what the command prints of tiny images."""

    def call(*args):
        words = [*map(str, args), '--size=64', '--device=cpu']
        monkeypatch.setattr('sys.argv', ['dense_probe.py', *words])
        try:
            tool.main()
        finally:
            logging.disable(logging.NOTSET)
        return capsys.readouterr().out

    return call


def test_table_and_verdict(call, voc, checkpoint):
    data = '--data-root', voc, '--unlabeled', voc / 'JPEGImages'
    flags = '--max-images=4', '--seeds=2'
    lines = call(checkpoint, *data, *flags).splitlines()
    for name in ('random weights', 'net'):
        (row,) = [x for x in lines if x.startswith(f'│ {name} ')]
        assert row.count('±') == 3
    for name in ('the same position', 'chance'):
        assert any(name in x and x.count('±') == 1 for x in lines)
    for column in ('mIoU, linear', 'mIoU, kNN'):
        (sentence,) = [x for x in lines if x.startswith(f'net, {column}:')]
        assert re.search(r'random weights.* by .* \(.* to .*\)$', sentence)
    (sentence,) = [x for x in lines if x.startswith('net, matches right:')]
    assert 'only 4 pairs' in sentence


@pytest.fixture
def cityscapes(voc, tmp_path):
    """The same files, laid out otherwise."""
    root = tmp_path / 'cityscapes'
    for path in voc.glob('*/*.*'):
        name, split = path.stem, path.stem.rstrip('0123456789')
        if path.suffix == '.jpg':
            new = f'leftImg8bit/{split}/town/{name}_leftImg8bit.jpg'
        else:
            new = f'gtFine/{split}/town/{name}_gtFine_labelTrainIds.png'
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / new)
    return root


def test_layouts_many_checkpoints_and_json(
    call, voc, cityscapes, checkpoint, tmp_path
):
    """Both layouts give the same numbers; the file says where from."""
    history = HistoryBuffer([90.0] * 20, [1] * 20)
    state = torch.load(checkpoint)
    run = dict(
        state_dict={f'backbone.{k}': v for k, v in state.items()},
        meta=dict(experiment_name='densecl_20260102_030405', seed=7, epoch=3),
        message_hub=dict(log_scalars={'train/position_r2': history}),
    )
    paths = [tmp_path / f'seed{seed}/epoch_3.pth' for seed in (0, 1)]
    for path in paths:
        path.parent.mkdir()
        torch.save(run, path)
    file = tmp_path / 'new/scores.json'
    call(*paths, '--data-root', voc, cityscapes, '--seeds=2', '--json', file)
    found = json.loads(file.read_text())
    names = ['random weights', 'seed0/epoch_3', 'seed1/epoch_3']
    assert sorted(x['name'] for x in found['rows']) == names
    row = found['rows'][1]
    assert len(row.pop('sha256')) == 64 and row.pop('name') in names
    assert Path(row.pop('checkpoint')) in paths
    assert row == dict(
        baseline='random weights',
        source='OpenMMLab model',
        config='densecl',
        seed=7,
        epochs=3,
        position_r2=90.0,
    )
    assert found['data'][1]['classes'] == ['road', 'sidewalk', 'building']
    assert [x['num_train'] for x in found['data']] == [6, 6]
    assert found['size'] == 64 and found['versions']['torch']
    values = found['values']
    for probe in ('linear', 'kNN'):
        one = values[f'{voc.name}: mIoU, {probe}']
        assert one == values[f'{cityscapes.name}: mIoU, {probe}']
        assert sorted(one) == names
        assert one[names[1]] == one[names[2]] != one[names[0]]
        assert all(len(x) == 2 for x in one.values())


def test_one_baseline_and_one_rule(call, tool, voc, checkpoint, monkeypatch):
    """What visualize_correspondence.py says of the same pairs and seeds."""
    seen = []

    def keep(*args):
        seen.append(compare(*args))
        return seen[-1]

    monkeypatch.setattr(tool, 'compare', keep)
    few = '--max-images=9', '--seeds=2'
    printed = call(checkpoint, '--unlabeled', voc / 'JPEGImages', *few)
    assert seen[0].sentence() in printed.splitlines()[-1]
    part = tool.UnlabeledPart(tool.parse_args())
    trained = load_backbone(checkpoint)
    found = [], []
    for seed in range(2):
        pairs = part.pairs(seed)
        random = trained.untrained(pairs.query, seed)
        found[0].append(measure(trained, pairs))
        found[1].append(measure(random, pairs))
    assert compare(*map(mean_accuracy, found)) == seen[0]
    assert seen[0].pairs == 9


@pytest.mark.parametrize('values, base, words', [
    # More than two standard deviations, but of two differences only.
    ([50.7, 51.3], [50.0, 50.0],
     'not told apart from random weights: better by 1.0 (-2.8 to 4.8)'),
    ([51.0, 53.0, 52.0], [50.5, 51.5, 51.0],
     'not told apart from random weights: better by 1.0 (-0.2 to 2.2)'),
    ([51.0, 52.0, 53.0, 54.0], [50.1, 50.9, 52.1, 52.9],
     'better than random weights by 1.0 (0.8 to 1.2)'),
    ([49.0, 48.9], [50.0, 50.0],
     'worse than random weights by 1.1 (0.4 to 1.7)'),
    ([50.0, 60.0], [50.0, 60.0],
     'not told apart from random weights: better by 0.0 (0.0 to 0.0)'),
    ([51.0], [50.0],
     'better than random weights by 1.0 (one seed, so no interval is known)'),
])  # fmt: skip
def test_difference(tool, values, base, words):
    assert tool.difference(values, base) == words


@pytest.mark.parametrize(
    'flags, message',
    [
        ('', 'give --data-root, --unlabeled or both'),
        ('--unlabeled x --label a b', '1 checkpoints need as many'),
        ('--data-root nowhere', 'There is no list "nowhere'),
    ],
)
def test_bad_flags(call, checkpoint, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        call(checkpoint, *flags.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
