# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Backbones with several maps, or with parameters that get no gradient."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmpretrain.structures import DataSample
from ranks import run_ranks

from mmdensecl.registry import MODELS

BACKBONES = dict(
    HRNet=(dict(arch='w18'), 144),
    ResNet=(
        dict(
            depth=18,
            stem_channels=16,
            base_channels=16,
            out_indices=(0, 1, 2, 3),
        ),
        128,
    ),
    BEiTViT=(
        dict(
            arch=dict(
                embed_dims=16,
                num_layers=1,
                num_heads=1,
                feedforward_channels=16,
            ),
            img_size=32,
            out_type='featmap',
        ),
        16,
    ),
)


def train(rank, world_size, name, unused):
    settings, channels = BACKBONES[name]
    model = MODELS.build(
        dict(
            type='mmdensecl.DenseCL',
            backbone=dict(type=f'mmpretrain.{name}', **settings),
            neck=dict(
                type='mmdensecl.DenseCLNeck',
                in_channels=channels,
                hid_channels=8,
                out_channels=4,
            ),
            queue_len=8,
            feat_dim=4,
        )
    ).train()
    wrapped = MMDistributedDataParallel(model, find_unused_parameters=unused)
    torch.manual_seed(rank)
    for _ in range(2):  # the second would miss gradients that never came
        samples = [
            DataSample(metainfo=dict(views=[[0, 0, 32, 32, 0]] * 2))
            for _ in range(2)
        ]
        views = [torch.randn(2, 3, 32, 32) for _ in range(2)]
        losses = wrapped(views, samples, mode='loss')
        sum(x for k, x in losses.items() if 'loss' in k).backward()
    return [
        x.grad.clone() if x.grad is not None else torch.zeros(1)
        for x in model.backbone.parameters()
    ]


@pytest.mark.parametrize('name', BACKBONES)
def test_two_ranks(name, tmp_path):
    grads = run_ranks(train, 2, tmp_path, name, name != 'ResNet')
    assert len(grads[0]) == len(grads[1]) > 0
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and a.isfinite().all()
