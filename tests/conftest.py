# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import copy
import json
import multiprocessing
import random
import signal

import numpy as np
import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would what tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tensors of the tests are tiny: more threads only wait for each other.
torch.set_num_threads(1)

# What is forked from the server has imported these already, and nothing of
# ours: what a test starts must import that itself.
multiprocessing.set_forkserver_preload(
    [
        'mmengine.runner',
        'mmpretrain.models',
        'mmpretrain.datasets',
        'mmpretrain.evaluation',
        'matplotlib.pyplot',
        'torch._dynamo',
    ]
)

# A ResNet-18 of 4 channels: 32 x 32 pixels become a 4 x 4 map of 32 channels.
TINY_RESNET = dict(
    type='mmpretrain.ResNet',
    depth=18,
    stem_channels=4,
    base_channels=4,
    strides=(1, 1, 1, 2),
)

TINY_NECK = dict(in_channels=32, hid_channels=8, out_channels=4)
TINY_MODELS = {
    name: dict(
        type=f'mmdensecl.{name}',
        backbone=TINY_RESNET,
        neck=dict(type=neck, **TINY_NECK),
        queue_len=8,
        feat_dim=4,
    )
    for name, neck in dict(
        DenseCL='mmdensecl.DenseCLNeck', MoCoV2='mmpretrain.MoCoV2Neck'
    ).items()
}


# A worker of pytest-xdist takes whole files: a long one at the end would leave
# the other workers nothing to do.
LONG_FIRST = ['test_tutorial.py', 'tools', 'distributed', 'configs']


def pytest_collection_modifyitems(items):
    """Start with what takes longest, as it starts processes or trains."""

    def place(item):
        names = [x for x in LONG_FIRST if x in item.path.parts[-2:]]
        return LONG_FIRST.index(names[0]) if names else len(LONG_FIRST)

    items.sort(key=place)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def tiny_cfg():
    """Function that gives the config of a tiny model, with changes."""

    def make(name: str = 'DenseCL', num_grid=None, **changes) -> dict:
        cfg = copy.deepcopy(TINY_MODELS[name])
        if num_grid is not None:
            cfg['neck']['num_grid'] = num_grid
        return {**cfg, **changes}

    return make


@pytest.fixture
def build_tiny(tiny_cfg):
    """Function that builds a tiny model in train mode."""
    from mmdensecl.registry import MODELS

    def build(*args, **kwargs):
        model = MODELS.build(tiny_cfg(*args, **kwargs))
        model.init_weights()
        return model.train()

    return build


@pytest.fixture
def train(tmp_path, tiny_cfg):
    """Function that trains two epochs of two iterations.

    Returns the Runner, numbers drawn afterwards and the rows of its log.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    from mmdensecl.testing import write_pictures

    write_pictures(tmp_path / 'unlabeled', 8, size=40)
    pipeline = [
        dict(type='mmdensecl.DecodeRGB'),
        dict(type='mmdensecl.TwoViews', size=32),
        dict(type='mmdensecl.PackViews'),
    ]
    dataset = dict(type='mmdensecl.UnlabeledFolder', pipeline=pipeline)

    def run(name, hooks=(), wrapper='OptimWrapper'):
        init_default_scope('mmpretrain')
        cfg = tiny_cfg()
        cfg['backbone'] = dict(cfg['backbone'], frozen_stages=1)
        cfg['data_preprocessor'] = dict(mean=[120.0] * 3, std=[60.0] * 3)
        settings = dict(
            model=cfg,
            work_dir=str(tmp_path / name),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate'),
                dataset=dict(dataset, data_root=str(tmp_path / 'unlabeled')),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(
                type=wrapper, optimizer=dict(type='SGD', lr=0.1)
            ),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
            randomness=dict(seed=0),
            default_scope='mmpretrain',
            experiment_name=f'{tmp_path.name}_{name}',
        )
        saved = Config(copy.deepcopy(settings))
        runner = Runner(**settings, custom_hooks=[*hooks], cfg=saved)
        runner.train()
        drawn = torch.rand(3).tolist(), np.random.rand(3).tolist()
        rows = []
        for path in (tmp_path / name).glob('*/vis_data/scalars.json'):
            rows += map(json.loads, path.read_text().splitlines())
        return runner, (*drawn, random.random()), rows

    return run
