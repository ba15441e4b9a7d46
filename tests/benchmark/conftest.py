# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A suite whose runs take no time: its tools/train.py only pretends."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

from mmdensecl.benchmark.plan import Setup

TOOL = Path(__file__).parents[2] / 'tools' / 'benchmark.py'
CONFIG = """
data_root = 'data/coco/'
default_scope = 'mmdet'
model = dict(
    type='Detector',
    backbone=dict(type='ResNet', depth=18, init_cfg=dict(
        type='mmdensecl.PretrainedBackbone', checkpoint=None)),
    head=dict(num_classes=80))
train_dataloader = dict(batch_size=2, dataset=dict(
    type='CocoDataset', data_root=data_root))
val_dataloader = dict(dataset=dict(type='CocoDataset', data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', metric=['bbox', 'segm'])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=10)
auto_scale_lr = dict(base_batch_size=4)
"""
SUITE = """
name = 'tiny'
title = 'A tiny suite'
description = 'For tests.'
tasks = [
    dict(name='seg', title='Segmentation', model='FCN', data='coco',
         layout='coco', configs=dict(frozen='seg.py', finetune='seg.py'),
         metrics=[dict(key='mIoU', name='mIoU', unit='%')]),
    dict(name='det', title='Detection', model='RetinaNet', data='coco',
         layout='coco', configs=dict(finetune='seg.py'),
         metrics=[dict(key='AP', name='AP', scale=100., unit='%')]),
    dict(name='knn', title='Neighbours', model='kNN', data='coco',
         layout='coco', configs=dict(frozen='knn.py'),
         metrics=[dict(key='mIoU', name='mIoU')]),
]
"""
# Behaves as mmengine does, as far as the benchmark looks. FAIL, SLOW, KILL,
# NOTHING and NO_VAL in the environment hold words that are searched for in the
# work_dir; checkpoints are copies of the file WEIGHTS.
TRAIN = """
import json, os, shutil, sys, time
from pathlib import Path
work_dir = Path(sys.argv[sys.argv.index('--work-dir') + 1])
config = Path(sys.argv[1]).read_text()

def asked(name):
    words = os.environ.get(name)
    return words is not None and words in str(work_dir)

with open(work_dir / 'calls', 'a') as file:
    print(Path(sys.argv[0]).name, *sys.argv[2:], os.environ.get(
        'OMP_NUM_THREADS'), file=file)
stamp = time.strftime('%Y%m%d_%H%M%S')
vis = work_dir / stamp / 'vis_data'
vis.mkdir(parents=True, exist_ok=True)
last = work_dir / 'last_checkpoint'
start = int(last.read_text().split('_')[-1][:-4]) if last.exists() else 0
metrics = dict(mIoU=50. + len(config) % 7, AP=0.25)
said = ['cup', 'plate'] if 'random' not in str(work_dir) else ['cup']
said = [] if asked('NOTHING') else said
(work_dir / 'predicted.json').write_text(json.dumps(
    dict(of=2, predicted=said)))
if Path(sys.argv[0]).name == 'test.py':
    (work_dir / stamp / f'{stamp}.json').write_text(json.dumps(metrics))
    sys.exit()
with open(vis / 'scalars.json', 'a') as log:
    for step in range(start + 1, 11):
        print(json.dumps(dict(lr=0.1, loss=1. / step, iter=step, step=step)),
              file=log, flush=True)
        if step % 5 == 0:
            path = work_dir / f'iter_{step}.pth'
            shutil.copy(os.environ['WEIGHTS'], path)
            last.write_text(str(path))
        if step == 6 and asked('FAIL'):
            raise RuntimeError('this run was told to fail')
        if step == 6 and asked('SLOW'):
            time.sleep(120)
    if asked('KILL'):
        os.kill(os.getpid(), 9)
    if not (asked('NO_VAL') or asked('NOTHING')):
        print(json.dumps(dict(**metrics, step=10)), file=log)
    elif asked('NOTHING'):
        print(json.dumps(dict(data_time=0.1, step=10)), file=log)
"""
ANNOTATIONS = """{"images": [], "annotations": [], "categories":
 [{"id": 3, "name": "cup"}, {"id": 5, "name": "<b>plate</b>"}]}"""


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """Files of random ResNet-18 weights, two pre-trainings of a method."""
    folder = tmp_path_factory.mktemp('weights')
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(resnet18().state_dict(), folder / f'{seed}.pth')
    return [folder / '0.pth', folder / '1.pth']


@pytest.fixture
def place(tmp_path, weights, monkeypatch):
    """A folder with data, a suite file and pretending tools."""
    monkeypatch.setenv('WEIGHTS', str(weights[0]))
    data = tmp_path / 'data' / 'coco' / 'annotations'
    data.mkdir(parents=True)
    (data / 'instances_val2017.json').write_text(ANNOTATIONS)
    (tmp_path / 'seg.py').write_text(CONFIG)
    (tmp_path / 'knn.py').write_text(CONFIG.replace('train_cfg', 'unused'))
    (tmp_path / 'tiny.py').write_text(SUITE)
    (tmp_path / 'tools').mkdir()
    for name in ('train', 'test'):
        (tmp_path / 'tools' / f'{name}.py').write_text(TRAIN)
    return tmp_path


@pytest.fixture
def setup(place):
    """How the runs of the suite are made."""
    return Setup(place / 'out' / 'tiny', place / 'data')


@pytest.fixture
def tool(place, monkeypatch, capsys):
    """Function that calls the tool and returns its status and words."""
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = place  # of the pretending tools
    # These would import the hosts; test_labels.py has tests of the one.
    monkeypatch.setattr(module, 'check_labels', lambda cfg: ['looked at'])
    monkeypatch.setattr(module.plan, 'check_fit', lambda runs: None)

    def call(*args):
        command = ['benchmark.py', *map(str, args)]
        monkeypatch.setattr(sys, 'argv', command)
        code = module.main()
        return code, ' '.join(capsys.readouterr().out.split())

    return call


@pytest.fixture
def run(tool, place):
    """Function that calls the tool to run the suite."""

    def call(*args):
        where = '--data-root', place / 'data', '--work-dir', place / 'out'
        return tool('run', place / 'tiny.py', *where, *args)

    return call
