# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A suite whose runs take no time: its tools/train.py only pretends."""
import importlib.util
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18

TOOL = Path(__file__).parents[2] / 'tools' / 'benchmark.py'
CONFIG = """
data_root = 'data/coco/'
default_scope = 'mmdet'
model = dict(
    backbone=dict(type='ResNet', depth=18, init_cfg=dict(
        type='mmdensecl.PretrainedBackbone', checkpoint=None)),
    head=dict(num_classes=80))
train_dataloader = dict(batch_size=2, dataset=dict(
    type='CocoDataset', data_root=data_root))
val_dataloader = dict(dataset=dict(type='CocoDataset', data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/x.json')
train_cfg = dict(type='IterBasedTrainLoop', max_iters=10)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(logger=dict(type='LoggerHook'))
"""
SUITE = """
name = 'tiny'
title = 'A tiny suite'
description = 'For tests.'
tasks = [
    dict(name='seg', title='Segmentation', model='FCN', data='coco',
         layout='coco', configs=dict(frozen='seg.py', finetune='seg.py'),
         metrics=[dict(key='mIoU', name='mIoU', scale=1., unit='%')]),
    dict(name='det', title='Detection', model='RetinaNet', data='coco',
         layout='coco', configs=dict(finetune='det.py'),
         metrics=[dict(key='AP', name='AP', scale=100., unit='%')]),
]
"""
# Behaves as mmengine does, as far as the benchmark looks. What it shall do
# stands in the environment: FAIL, SLOW, KILL, NOTHING and NO_VAL hold words
# that are searched for in the work_dir. Its checkpoints are copies of the file
# that WEIGHTS names, by default of one of no weights.
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
    if asked('NOTHING'):  # mmdet's CocoMetric
        print('Evaluating bbox...')
        print('The testing results of the whole dataset is empty.')
        print(json.dumps(dict(data_time=0.1, step=10)), file=log)
    elif not asked('NO_VAL'):
        print(json.dumps(dict(**metrics, data_time=0.1, step=10)), file=log)
"""
# A task that trains nothing.
PROBE = """
tasks.append(
    dict(name='knn', title='Neighbours', model='kNN', data='coco',
         layout='coco', configs=dict(frozen='knn.py'),
         metrics=[dict(key='mIoU', name='mIoU', scale=1., unit='%')]))
"""
ANNOTATIONS = """{"images": [], "annotations": [], "categories":
 [{"id": 3, "name": "cup"}, {"id": 5, "name": "<b>plate</b>"}]}"""


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """A file of random ResNet-18 weights."""
    path = tmp_path_factory.mktemp('weights') / 'resnet18.pth'
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), path)
    return path


def save_training(path, state_dict):
    """Save a checkpoint such as mmengine saves, of nothing but weights."""
    torch.save(
        dict(
            meta=dict(epoch=0, iter=0),
            state_dict=state_dict,
            message_hub={},
            optimizer={}), path)
    return path


@pytest.fixture(scope='session')
def no_weights(tmp_path_factory):
    return save_training(tmp_path_factory.mktemp('weights') / 'none.pth', {})


@pytest.fixture(scope='session')
def trained_weights(weights):
    """As a training of ours would save the weights."""
    return save_training(weights.with_name('trained.pth'), torch.load(weights))


@pytest.fixture
def tool(place, monkeypatch, capsys):
    """Function that calls the tool and returns its status and words."""
    spec = importlib.util.spec_from_file_location('benchmark_tool', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = place  # of the pretending train.py
    monkeypatch.setattr('mmdensecl.benchmark.runner.POLL', 0.02)
    monkeypatch.setattr('mmdensecl.benchmark.runner.collect_env', dict)

    def call(*args):
        command = ['benchmark.py', *map(str, args)]
        monkeypatch.setattr(sys, 'argv', command)
        code = module.main()
        return code, ' '.join(capsys.readouterr().out.split())

    return call


@pytest.fixture
def probe(place):
    """Adds the task of a probe to the suite."""
    (place / 'knn.py').write_text(CONFIG.replace('train_cfg', 'unused'))
    with open(place / 'tiny.py', 'a') as file:
        file.write(PROBE)


@pytest.fixture
def place(tmp_path, no_weights, monkeypatch):
    """A folder with data, a suite file and pretending tools."""
    monkeypatch.setenv('WEIGHTS', str(no_weights))
    data = tmp_path / 'data' / 'coco' / 'annotations'
    data.mkdir(parents=True)
    (data / 'instances_val2017.json').write_text(ANNOTATIONS)
    for name in ('seg', 'det'):
        (tmp_path / f'{name}.py').write_text(CONFIG)
    (tmp_path / 'tiny.py').write_text(SUITE)
    tools = tmp_path / 'tools'
    tools.mkdir()
    for name in ('train', 'test'):
        (tools / f'{name}.py').write_text(textwrap.dedent(TRAIN))
    return tmp_path
