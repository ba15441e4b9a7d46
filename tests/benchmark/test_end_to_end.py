# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A config of a user's own, from the command to the page, really trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

pytest.importorskip('mmseg')
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_own_config(tmp_path, weights):
    rng = np.random.default_rng(0)
    for kind in ('train', 'val', 'train_m', 'val_m'):
        (tmp_path / kind).mkdir()
        high, size = (2, (32, 32)) if '_m' in kind else (255, (32, 32, 3))
        for i in range(4):
            pixels = rng.integers(0, high, size, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f'{i}.png')
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]

    def loader(split):
        prefix = dict(img_path=split, seg_map_path=f'{split}_m')
        dataset = dict(type='BaseSegDataset', data_root=str(tmp_path))
        dataset.update(data_prefix=prefix, img_suffix='.png')
        dataset['metainfo'] = dict(classes=('even', 'odd'))
        dataset['pipeline'] = [*load, dict(type='PackSegInputs')]
        sampler = dict(type='DefaultSampler', shuffle=split == 'train')
        return dict(batch_size=2, num_workers=0, sampler=sampler,
                    dataset=dataset)  # fmt: skip

    head = dict(type='FCNHead', in_channels=512, channels=8, num_convs=1)
    head.update(num_classes=2, norm_cfg=dict(type='BN'), in_index=3)
    model = dict(type='EncoderDecoder', decode_head=head)
    model['backbone'] = dict(type='ResNet', depth=18, style='pytorch')
    model['data_preprocessor'] = dict(type='SegDataPreProcessor',
                                      size=(32, 32))  # fmt: skip
    model.update(train_cfg=dict(), test_cfg=dict(mode='whole'))
    optimizer = dict(type='SGD', lr=0.1)
    cfg = dict(default_scope='mmseg', model=model)
    cfg.update(
        train_dataloader=loader('train'),
        val_dataloader=loader('val'),
        test_dataloader=loader('val'),
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
        val_cfg=dict(type='ValLoop'),
        test_cfg=dict(type='TestLoop'),
        optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer),
        visualizer=dict(type='SegLocalVisualizer'),
    )
    Config(cfg).dump(tmp_path / 'mine.py')
    command = [sys.executable, str(ROOT / 'tools/benchmark.py'), 'run']
    command += [str(tmp_path / 'mine.py'), '--mode', 'frozen', '--work-dir']
    command += [str(tmp_path / 'out'), '--checkpoint', f'A={weights[0]}']
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / 'out/mine'
    run = folder / 'mine/frozen/A/pretrain0/seed0'
    log = (run / 'output.txt').read_text()
    assert 'loaded 120/120 tensors' in log
    given = torch.load(weights[0])
    saved = torch.load(run / 'iter_2.pth', weights_only=False)['state_dict']
    names = [k for k in saved if k.startswith('backbone.')]
    assert len(names) == 120
    for name in names:  # weights and statistics stayed as they were
        assert torch.equal(saved[name], given[name.partition('.')[2]]), name
    result = json.loads((run / 'result.json').read_text())
    assert 0 <= result['metrics']['mIoU'] <= 100
    text = (folder / 'report/report.md').read_text()
    assert '| A | 1 x 1 |' in text and 'not told apart' in text
    page = (folder / 'report/report.html').read_text()
    assert page.count('<img') >= 1 + 3 * 4
