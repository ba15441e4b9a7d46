# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Backbones with several maps, or with parameters that get no gradient."""

import torch
from mmengine.model import MMDistributedDataParallel
from mmpretrain.structures import DataSample
from ranks import run_ranks

from mmdensecl.registry import MODELS

VIT = dict(embed_dims=16, num_layers=1, num_heads=1, feedforward_channels=16)
# Each with the channels of its last map.
BACKBONES = [
    (dict(type='mmpretrain.HRNet', arch='w18'), 144),
    (
        dict(
            type='mmpretrain.ResNet',
            depth=18,
            stem_channels=16,
            base_channels=16,
            out_indices=(0, 1, 2, 3),
        ),
        128,
    ),
    (
        dict(
            type='mmpretrain.BEiTViT',
            arch=VIT,
            img_size=32,
            out_type='featmap',
        ),
        16,
    ),
]


def train(rank, backbone, channels):
    """The gradients of two steps."""
    neck = dict(in_channels=channels, hid_channels=8, out_channels=4)
    cfg = dict(type='mmdensecl.DenseCL', backbone=backbone, queue_len=8)
    cfg.update(neck=dict(type='mmdensecl.DenseCLNeck', **neck), feat_dim=4)
    torch.manual_seed(0)
    model = MODELS.build(cfg).train()
    wrapped = MMDistributedDataParallel(
        model, find_unused_parameters='ResNet' not in backbone['type']
    )
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


def train_all(rank, world_size):
    return [train(rank, *x) for x in BACKBONES]


def test_two_ranks(tmp_path):
    first, second = run_ranks(train_all, 2, tmp_path)
    for grads in zip(first, second, strict=True):
        assert len(grads[0]) > 0
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, atol=1e-6) and a.isfinite().all()
