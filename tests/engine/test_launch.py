# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from copy import deepcopy

import pytest
import torch
from mmengine.config import Config

from mmdensecl.engine import prepare_cpu_launch

NORM = dict(type='SyncBN', requires_grad=True)
MODEL = dict(
    type='Detector',
    backbone=dict(type='ResNet', norm_cfg=NORM),
    heads=[dict(norm_cfg=NORM), dict(norm_cfg=dict(type='GN', num_groups=32))],
    head=dict(norm_cfg=dict(type='MMSyncBN')),
)


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(
        torch.distributed, 'init_process_group', lambda **_: None
    )


def prepared(launcher):
    cfg = Config(dict(launcher=launcher, model=deepcopy(MODEL)))
    prepare_cpu_launch(cfg)
    return cfg


def test_sync_bn_becomes_bn_on_cpu_ranks(without_gpu, monkeypatch):
    """And is said once."""
    lines = []
    monkeypatch.setattr(
        'mmdensecl.engine.launch.print_log',
        lambda line, **_: lines.append(line),
    )
    model = prepared('pytorch').model
    assert model.backbone.norm_cfg == dict(type='BN', requires_grad=True)
    assert model.heads[0].norm_cfg.type == 'BN'
    assert model.heads[1].norm_cfg == dict(type='GN', num_groups=32)
    assert model.head.norm_cfg.type == 'BN'
    assert model.backbone.type == 'ResNet'
    (line,) = lines
    assert '3 norm settings' in line and 'SyncBN to BN' in line


def test_sync_bn_stays_where_gpus_or_one_process_are(monkeypatch):
    assert prepared('none').model == MODEL  # mmengine reverts it
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert prepared('pytorch').model == MODEL


def test_slurm_without_gpus(without_gpu):
    with pytest.raises(RuntimeError, match='tools/dist_train.sh'):
        prepared('slurm')
