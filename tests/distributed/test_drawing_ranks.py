# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Hooks that look at the model leave a run of two processes as it is."""

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner
from ranks import run_ranks

from mmdensecl.registry import MODELS
from mmdensecl.testing import write_pictures


def train(rank, world_size, model, folder, name, hooks):
    """Weights after two epochs of a real Runner."""
    module = MODELS.build(model)
    module.init_weights()
    pipeline = [
        dict(type='mmdensecl.DecodeRGB'),
        dict(type='mmdensecl.TwoViews', size=32),
        dict(type='mmdensecl.PackViews'),
    ]
    pictures = dict(data_root=f'{folder}/pictures', pipeline=pipeline)
    loader = dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'),
        dataset=dict(pictures, type='mmdensecl.UnlabeledFolder'),
    )
    runner = Runner(
        model=MMDistributedDataParallel(module, broadcast_buffers=False),
        work_dir=f'{folder}/{name}',
        train_dataloader=loader,
        cfg=dict(train_dataloader=loader),  # of which the pictures are drawn
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=hooks,
        visualizer=dict(
            type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]
        ),
        randomness=dict(seed=0),
        default_scope='mmpretrain',
        experiment_name=name,
    )
    runner.train()
    return dict(module.state_dict(), drawn=torch.rand(3))


def test_two_ranks(tiny_cfg, tmp_path):
    write_pictures(tmp_path / 'pictures', 8)
    for seed, label in enumerate('ab'):
        write_pictures(tmp_path / 'labelled' / label, 5, size=40, seed=seed)
    model = tiny_cfg(data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3))
    knn = dict(data_root=str(tmp_path / 'labelled'), k=1, size=32)
    draw = dict(interval=1, num_images=1, size=48)
    hooks = [
        dict(knn, type='mmdensecl.KNNHook', num_workers=0),
        dict(draw, type='mmdensecl.VisualizeFeaturesHook'),
    ]
    found = [
        run_ranks(train, 2, tmp_path, model, str(tmp_path), name, added)
        for name, added in (('plain', []), ('hooks', hooks))
    ]
    for expected, got in zip(*found, strict=True):
        assert expected.keys() == got.keys()
        for key, x in expected.items():
            assert torch.equal(x, got[key]), key
    # One rank has written.
    (start,) = (tmp_path / 'hooks').glob('*/vis_data')
    assert (start / 'scalars.json').read_text().count('knn_top1') == 3
    assert {x.name for x in (start / 'vis_image').iterdir()} == {
        f'{kind}_{i}.png' for kind in ('features', 'matches') for i in (1, 2)
    }
