# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The command, on small scenes whose classes are colours."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from PIL import Image

from mmdensecl import load_backbone
from mmdensecl.evaluation.matching import compare, mean_accuracy, measure
from mmdensecl.registry import MODELS

ROOT = Path(__file__).parents[2]
COLOURS = ((90, 90, 90), (220, 40, 40), (40, 60, 220))


@pytest.fixture(scope='module')
def voc(tmp_path_factory):
    """Grey images with a red and a blue half of a frame."""
    root = tmp_path_factory.mktemp('voc')
    rng = np.random.default_rng(0)
    for folder in (
        'JPEGImages',
        'SegmentationClass',
        'ImageSets/Segmentation',
    ):
        (root / folder).mkdir(parents=True)
    for split, count in (('train', 6), ('val', 4)):
        names = [f'{split}{i}' for i in range(count)]
        (root / f'ImageSets/Segmentation/{split}.txt').write_text(
            '\n'.join(names)
        )
        for name in names:
            mask = np.zeros((64, 64), np.uint8)
            for value in (1, 2):
                top, left = rng.integers(0, 32, 2)
                mask[top : top + 32, left : left + 32] = value
            pixels = np.array(COLOURS)[mask] + rng.integers(
                -20, 20, (64, 64, 3)
            )
            Image.fromarray(pixels.astype(np.uint8)).save(
                root / f'JPEGImages/{name}.jpg'
            )
            mask[:2] = 255
            image = Image.fromarray(mask, 'P')
            image.putpalette([*range(256)] * 3)
            image.save(root / f'SegmentationClass/{name}.png')
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
def call(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'tools/analysis_tools'))
    monkeypatch.setenv('COLUMNS', '120')
    import dense_probe

    def run(*args):
        monkeypatch.setattr('sys.argv', ['dense_probe.py', *map(str, args)])
        try:
            dense_probe.main()
        finally:
            logging.disable(logging.NOTSET)
        return capsys.readouterr().out

    return run


def test_table_and_verdict(call, voc, checkpoint):
    printed = call(
        checkpoint,
        '--data-root',
        voc,
        '--unlabeled',
        voc / 'JPEGImages',
        '--max-images=4',
        '--size=64',
        '--seeds=2',
        '--device=cpu',
    )
    lines = printed.splitlines()
    for name in ('random weights', 'net'):
        (row,) = [x for x in lines if x.startswith(f'│ {name} ')]
        assert row.count('±') == 3
    for name in ('the same position', 'chance'):
        assert any(name in x and x.count('±') == 1 for x in lines)
    for column in ('mIoU, linear', 'mIoU, kNN'):
        (sentence,) = [x for x in lines if x.startswith(f'net, {column}:')]
        assert 'random weights' in sentence and '±' in sentence
    (sentence,) = [x for x in lines if x.startswith('net, matches right:')]
    assert 'only 4 pairs' in sentence


@pytest.fixture
def cityscapes(voc, tmp_path):
    """The same files, laid out otherwise."""
    for split in ('train', 'val'):
        for name in (
            (voc / f'ImageSets/Segmentation/{split}.txt').read_text().split()
        ):
            for old, new in (
                (f'JPEGImages/{name}.jpg', 'leftImg8bit/{}_leftImg8bit.jpg'),
                (
                    f'SegmentationClass/{name}.png',
                    'gtFine/{}_gtFine_labelTrainIds.png',
                ),
            ):
                new = (
                    tmp_path
                    / 'cityscapes'
                    / new.format(f'{split}/town/{name}')
                )
                new.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(voc / old, new)
    return tmp_path / 'cityscapes'


def test_layouts_many_checkpoints_and_json(
    call, voc, cityscapes, checkpoint, tmp_path
):
    """Both layouts give the same numbers; the file says where from."""
    history = HistoryBuffer([90.0] * 20, [1] * 20)
    run = dict(
        state_dict={
            f'backbone.{k}': v for k, v in torch.load(checkpoint).items()
        },
        meta=dict(experiment_name='densecl_20260102_030405', seed=7, epoch=3),
        message_hub=dict(log_scalars={'train/position_r2': history}),
    )
    for seed in (0, 1):
        path = tmp_path / f'seed{seed}/epoch_3.pth'
        path.parent.mkdir()
        torch.save(run, path)
    file = tmp_path / 'new/scores.json'
    call(
        *tmp_path.glob('seed*/*.pth'),
        '--data-root',
        voc,
        cityscapes,
        '--size=64',
        '--seeds=2',
        '--device=cpu',
        '--json',
        file,
    )
    found = json.loads(file.read_text())
    names = ['random weights', 'seed0/epoch_3', 'seed1/epoch_3']
    assert sorted(x['name'] for x in found['rows']) == names
    row = found['rows'][1]
    assert len(row.pop('sha256')) == 64 and row.pop('name') in names
    assert row == dict(
        baseline='random weights',
        checkpoint=row['checkpoint'],
        source='OpenMMLab model',
        config='densecl',
        seed=7,
        epochs=3,
        position_r2=90.0,
    )
    assert found['data'][1]['classes'] == ['road', 'sidewalk', 'building']
    assert [x['num_train'] for x in found['data']] == [6, 6]
    assert found['size'] == 64 and found['versions']['torch']
    for probe in ('linear', 'kNN'):
        one, two = (
            found['values'][f'{x.name}: mIoU, {probe}']
            for x in (voc, cityscapes)
        )
        assert one == two and sorted(one) == names
        assert one[names[1]] == one[names[2]] != one[names[0]]
        assert all(len(x) == 2 for x in one.values())


def test_one_seed(call, voc, checkpoint):
    printed = call(
        checkpoint,
        '--unlabeled',
        voc / 'JPEGImages',
        '--size=64',
        '--max-images=4',
        '--seeds=1',
        '--label',
        '[x]',
    )
    assert '[x], matches right: ' in printed
    assert 'mIoU' not in printed
    printed = call(
        checkpoint,
        '--data-root',
        voc,
        '--size=64',
        '--max-images=4',
        '--seeds=1',
    )
    assert 'one seed, so the spread is not known' in printed


def test_one_baseline_and_one_rule(call, voc, checkpoint, monkeypatch):
    """What visualize_correspondence.py says of the same pairs and seeds."""
    import dense_probe

    seen = []

    def keep(*args):
        seen.append(compare(*args))
        return seen[-1]

    monkeypatch.setattr(dense_probe, 'compare', keep)
    args = (
        checkpoint,
        '--unlabeled',
        voc / 'JPEGImages',
        '--size=64',
        '--max-images=9',
        '--seeds=2',
    )
    sentence = call(*args).splitlines()[-1]
    assert seen[0].sentence() in sentence
    monkeypatch.setattr('sys.argv', ['dense_probe.py', *map(str, args)])
    part = dense_probe.UnlabeledPart(dense_probe.parse_args())
    trained = load_backbone(checkpoint)
    found = [], []
    for seed in range(2):
        pairs = part.pairs(seed)
        for kept, backbone in zip(
            found,
            (trained, trained.untrained(pairs.query, seed)),
            strict=False,
        ):
            kept.append(measure(backbone, pairs))
    assert compare(*map(mean_accuracy, found)) == seen[0]
    assert seen[0].pairs == 9


@pytest.mark.parametrize(
    'values, base, words',
    [
        (
            [5.0, 6.0, 7.0],
            [1.0, 2.0, 3.2],
            'better than random weights by 3.9 ± 0.1',
        ),
        (
            [1.0, 2.0, 3.2],
            [5.0, 6.0, 7.0],
            'worse than random weights by 3.9 ± 0.1',
        ),
        (
            [1.0, 9.0],
            [2.0, 3.0],
            'not told apart from random weights: better by',
        ),
        (
            [50.0] * 3,
            [50.0] * 3,
            'not told apart from random weights: better by',
        ),
    ],
)
def test_differences(call, values, base, words):
    import dense_probe

    assert dense_probe.difference(values, base).startswith(words)


@pytest.mark.parametrize(
    'flags, message',
    [
        ((), 'give --data-root, --unlabeled or both'),
        (('--unlabeled', 'x', '--seeds', '0'), 'must be at least 1'),
        (
            ('--unlabeled', 'x', '--label', 'a', 'b'),
            '1 checkpoints need as many',
        ),
        (('--data-root', 'nowhere'), 'There is no list "nowhere'),
        (
            ('--unlabeled', '.', '--device', 'abacus'),
            'dense_probe.py: error: ',
        ),
    ],
)
def test_bad_flags(call, checkpoint, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        call(checkpoint, *flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
