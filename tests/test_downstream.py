# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A training checkpoint in an mmdet and an mmseg model, as the README says."""
import subprocess
import sys

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope

from mmdensecl.registry import MODELS

CODE = """
import torch
from mmengine.registry import MODELS, init_default_scope
import {imports}  # what custom_imports does
init_default_scope('{host}')
model = MODELS.build(dict(
    type='{host}.ResNet', depth=18, init_cfg=dict(
        type='Pretrained', checkpoint=r'{path}', prefix='backbone.')))
model.init_weights()
torch.save(model.state_dict(), r'{path}.{host}')
"""


@pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
def test_backbone_arrives_whole(host, tmp_path):
    init_default_scope('mmpretrain')
    model = MODELS.build(
        dict(
            type='mmdensecl.DenseCL',
            backbone=dict(type='ResNet', depth=18),
            neck=dict(
                type='mmdensecl.DenseCLNeck',
                in_channels=512,
                hid_channels=8,
                out_channels=128),
            queue_len=8))
    path = tmp_path / 'epoch_1.pth'
    torch.save(
        dict(
            state_dict=model.state_dict(),
            message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.], [1])))),
        path)
    subprocess.run([
        sys.executable, '-c',
        CODE.format(host=host, path=path, imports='mmdensecl')
    ],
                   check=True)
    loaded = torch.load(f'{path}.{host}')
    expected = model.backbone.state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name
