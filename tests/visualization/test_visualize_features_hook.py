# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmdensecl.engine import VisualizeFeaturesHook
from mmdensecl.testing import write_pictures

PIPELINE = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=32),
    dict(type='mmdensecl.PackViews'),
]


@pytest.fixture
def train(tiny_cfg, tmp_path):
    """Function that trains two epochs and gives the Runner."""
    write_pictures(tmp_path / 'images', 4)

    def run(name, **hooks):
        model = tiny_cfg(
            data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3)
        )
        cfg = Config(
            dict(
                default_scope='mmpretrain',
                model=model,
                work_dir=str(tmp_path / name),
                experiment_name=f'{name}_{tmp_path.name}',
                train_dataloader=dict(
                    batch_size=2,
                    collate_fn=dict(type='default_collate'),
                    sampler=dict(type='DefaultSampler', shuffle=True),
                    dataset=dict(
                        type='mmdensecl.UnlabeledFolder',
                        data_root=str(tmp_path / 'images'),
                        pipeline=PIPELINE,
                    ),
                ),
                train_cfg=dict(
                    type='mmdensecl.ResumableEpochLoop', max_epochs=2
                ),
                optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
                visualizer=dict(
                    type='Visualizer',
                    name=f'{name}_{tmp_path.name}',
                    vis_backends=[dict(type='LocalVisBackend')],
                ),
                default_hooks=dict(hooks),
                randomness=dict(seed=0),
            )
        )
        runner = Runner.from_cfg(cfg)
        runner.train()
        return runner

    return run


def images_of(tmp_path, name):
    return sorted(x for x in (tmp_path / name).rglob('vis_image/*.png'))


def test_a_run_stays_the_same(train, tmp_path):
    hook = dict(
        type='mmdensecl.VisualizeFeaturesHook',
        interval=1,
        num_images=2,
        size=48,
    )
    without = train('without')
    with_hook = train('with', features=hook)
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
    runner = train(
        'broken',
        features=dict(type=hook.__name__, _scope_='mmdensecl', interval=2),
    )
    assert runner.epoch == 2
    log = next((tmp_path / 'broken').rglob('*.log')).read_text()
    assert log.count('drew nothing') == 1
    assert 'at epoch 2: OSError: the disk is full' in log
