# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Shipped suites: every task of `mini` trains a step and is scored."""

import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmpretrain.models import ResNet
from tiny_datasets import write_cityscapes, write_voc

from mmdensecl.benchmark.plan import Setup, task_config
from mmdensecl.benchmark.suite import load_suite
from mmdensecl.engine import override_data_root, set_pretrained

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytestmark = pytest.mark.usefixtures('fast_configs')

BENCHMARKS = Path(__file__).parents[2] / 'configs' / 'benchmarks'
SUITES = {
    name: load_suite(BENCHMARKS / 'suites' / f'{name}.py')
    for name in ('mini', 'paper', 'demo')
}
MINI = [
    (task, protocol)
    for name in ('mini', 'demo')
    for task in SUITES[name].tasks
    for protocol in task.configs
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Labelled folders, one of them with classes of its own."""
    root = tmp_path_factory.mktemp('data')
    write_voc(root / 'VOCdevkit')
    shutil.copytree(root / 'VOCdevkit' / 'VOC2012', root / 'fashion')
    names = '\n'.join(f'thing{i}' for i in range(20))
    (root / 'fashion' / 'class_names.txt').write_text(names)
    write_cityscapes(root / 'cityscapes')
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'resnet18.pth'
    torch.manual_seed(0)
    model = ResNet(18, stem_channels=16, base_channels=16)
    torch.save(model.state_dict(), path)
    return path


@pytest.mark.parametrize(
    'task, protocol', MINI, ids=[f'{t.name}-{p}' for t, p in MINI]
)
def test_trains_a_step(task, protocol, data, weights, tmp_path):
    cfg = task_config(task, protocol, Setup(tmp_path, data))
    set_pretrained(cfg, str(weights))
    cfg.work_dir = str(tmp_path)
    cfg.train_dataloader.batch_size = 2
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    # Without warm-up, that a single step shows.
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    runner = Runner.from_cfg(cfg)
    runner.train()
    given = torch.load(weights)
    changed = [
        name
        for name, value in runner.model.backbone.state_dict().items()
        if not torch.equal(value, given[name])
    ]
    assert bool(changed) == (protocol == 'finetune'), changed
    metrics = runner.message_hub.log_scalars
    for metric in task.metrics:
        assert f'val/{metric["key"]}' in metrics
    assert [*(tmp_path / 'predictions').glob('*_pred.png')]
    classes = runner.val_dataloader.dataset.metainfo['classes']
    assert runner.model.decode_head.num_classes == len(classes)
    if task.data == 'fashion':
        assert [*classes[:2]] == ['background', 'thing0']


def test_fashion_has_its_classes_without_a_suite(data):
    """As tools/train.py reads it."""
    cfg = Config.fromfile(BENCHMARKS / 'mini/fcn_r18w16-d16_fashion.py')
    override_data_root(cfg, str(data / 'fashion'))
    for split in ('train', 'val', 'test'):
        with DATASETS.switch_scope_and_registry('mmseg') as registry:
            dataset = registry.build(cfg[f'{split}_dataloader'].dataset)
        assert len(dataset) and dataset.metainfo['classes'] == cfg.classes


@pytest.mark.parametrize('suite', SUITES.values(), ids=SUITES)
def test_suites_are_whole(suite, data):
    assert len({task.name for task in suite.tasks}) == len(suite.tasks)
    for task in suite.tasks:
        names = [metric['name'] for metric in task.metrics]
        assert len(set(names)) == len(names)
        for protocol in task.configs:
            cfg = task_config(task, protocol, Setup(data, data))
            assert str(data) in str(cfg.to_dict())
        for number in task.published:
            assert number['metric'] in names and number['source']
            assert number['mode'] in task.configs
        if len(task.configs) < 2:
            continue
        # Both protocols differ in what is frozen and in nothing else.
        frozen, tuned = (
            task_config(task, protocol, Setup(data, data)).to_dict()
            for protocol in ('frozen', 'finetune')
        )
        for cfg in (frozen, tuned):
            cfg['model']['backbone'].pop('frozen_stages', None)
            cfg['model']['backbone'].pop('norm_eval', None)
            head = cfg['model'].get('roi_head', {}).get('shared_head')
            (head or {}).pop('frozen', None)
        assert frozen == tuned


def test_published_numbers():
    tasks = {task.name: task for task in SUITES['paper'].tasks}

    def values(task, row, metric):
        return [
            x['value']
            for x in tasks[task].published
            if (x['method'], x['metric']) == (row, metric)
        ]

    assert values('voc_det_c4', 'MoCo-v2', 'AP75') == [63.43]
    # The authors', and those of mmselfsup's model zoo.
    assert values('voc_seg', 'DenseCL', 'mIoU') == [69.4, 69.47]
    assert values('coco_fpn_1x', 'DenseCL', 'mask AP') == [36.4, 0.9]
    assert values('voc07_svm', 'MoCo-v2', 'mAP') == [84.0]
    assert values('voc_seg', 'DenseCL (COCO, 800 epochs)', 'mIoU') == [67.5]
    (difference,) = tasks['cityscapes_769'].published
    assert (difference['value'], difference['over']) == (1.8, 'MoCo-v2')
    assert not any(task.published for task in SUITES['mini'].tasks)
