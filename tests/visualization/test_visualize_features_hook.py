# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.

import cv2
import torch

from mmdensecl.engine import VisualizeFeaturesHook


def images_of(tmp_path, name):
    return sorted(x for x in (tmp_path / name).rglob('vis_image/*.png'))


def test_a_run_stays_the_same(train, tmp_path):
    hook = dict(
        type='mmdensecl.VisualizeFeaturesHook',
        interval=1,
        num_images=2,
        size=48,
    )
    without, numbers, _ = train('without')
    with_hook, other, _ = train('with', [hook])
    states = [x.model.state_dict() for x in (without, with_hook)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert not images_of(tmp_path, 'without')
    drawn = images_of(tmp_path, 'with')
    assert [x.name for x in drawn] == [
        'features_1.png',
        'features_2.png',
        'matches_1.png',
        'matches_2.png',
    ]
    for path in drawn:
        assert cv2.imread(str(path)).std() > 10


def test_what_goes_wrong_is_a_warning(train, tmp_path, monkeypatch):
    hook = VisualizeFeaturesHook

    def fail(self, runner):
        torch.rand(3)
        raise OSError('the disk is full')

    monkeypatch.setattr(hook, '_draw_images', fail)
    runner, *_ = train('broken', [hook(interval=2)])
    assert runner.epoch == 2
    log = next((tmp_path / 'broken').rglob('*.log')).read_text()
    assert log.count('drew nothing') == 1
    assert 'at epoch 2: OSError: the disk is full' in log
