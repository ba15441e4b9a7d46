# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The tools themselves, given a stranger's checkpoint.

tests/hostile has every kind of file, and the functions that read them.
"""
import os

import pytest
import torch
from runs import ROOT, prepare, tool

from mmdensecl.testing import write_pictures

PRETRAINED = """
_base_ = './tiny.py'
data_root = 'pictures'
train_dataloader = dict(dataset=dict(data_root=data_root))
model = dict(backbone=dict(init_cfg=[dict(
    type='mmdensecl.PretrainedBackbone', checkpoint='')]))
"""
OPENMMLAB = """
_base_ = './tiny.py'
data_root = 'pictures'
train_dataloader = dict(dataset=dict(data_root=data_root))
model = dict(backbone=dict(init_cfg=[dict(
    type='Pretrained', checkpoint='bad.pth', prefix='backbone.')]))
"""

KNN = f"""
_base_ = '{ROOT}/configs/benchmarks/mmpretrain/resnet50_knn_in1k.py'
part = dict(num_workers=0, dataset=dict(
    data_root='labelled', split='', data_prefix='', classes=['a']))
test_dataloader = part
test_cfg = dict(train_dataloader=part)
"""


class Attack:

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary), )


@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    folder = prepare(tmp_path_factory.mktemp('hostile'))
    (folder / 'pretrained.py').write_text(PRETRAINED)
    (folder / 'openmmlab.py').write_text(OPENMMLAB)
    (folder / 'knn.py').write_text(KNN)
    (folder / 'work').mkdir()
    write_pictures(folder / 'labelled' / 'a', 1)
    content = dict(
        state_dict=dict(weight=Attack(folder / 'canary')),
        optimizer={},
        meta=dict(epoch=1, iter=3))
    torch.save(content, folder / 'bad.pth')
    torch.save(content, folder / 'work' / 'epoch_1.pth')
    return folder


@pytest.mark.parametrize('command', [
    'train.py tiny.py --resume bad.pth --cfg-options data_root=pictures',
    'train.py tiny.py --work-dir work --resume --cfg-options '
    'data_root=pictures',
    'train.py tiny.py --cfg-options data_root=pictures load_from=bad.pth',
    'train.py pretrained.py --pretrained bad.pth',
    'train.py openmmlab.py',
    'test.py knn.py bad.pth',
    'benchmark.py run mini --checkpoint a=bad.pth --data pictures',
    'analysis_tools/visualize_features.py tiny.py bad.pth pictures '
    '--output-dir out',
    'analysis_tools/visualize_correspondence.py tiny.py bad.pth '
    'pictures/0000.png',
    'analysis_tools/dense_probe.py bad.pth --unlabeled pictures',
    'model_converters/publish_backbone.py bad.pth out',
])
def test_tool(workplace, command):
    done = tool(
        *command.split(),
        cwd=workplace,
        # Set by users of mmengine 0.10.7 against its errors of resuming.
        env=dict(TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD='1'),
        check=False)
    assert not (workplace / 'canary').exists()
    assert done.returncode != 0
    assert 'could run code' in done.stdout
    assert 'Traceback' not in done.stdout
