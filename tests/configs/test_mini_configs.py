# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Shipped suites: every task of `mini` trains a step and is scored."""

from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from tiny_datasets import write_cityscapes, write_coco, write_voc
from torchvision.models import resnet18

from mmdensecl.benchmark.plan import task_config
from mmdensecl.benchmark.suite import load_suite
from mmdensecl.engine import set_pretrained

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytestmark = pytest.mark.usefixtures('fast_configs')

BENCHMARKS = Path(__file__).parents[2] / 'configs' / 'benchmarks'
SUITES = {
    name: load_suite(BENCHMARKS / 'suites' / f'{name}.py')
    for name in ('mini', 'paper', 'demo')
}
# The tiny set's objects are of category 18.
OWN_CLASSES = tuple(f'thing{i}' for i in range(18))
MINI = [
    (task, protocol)
    for name in ('mini', 'demo')
    for task in SUITES[name].tasks
    for protocol in task.configs
]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Labelled folders, COCO with classes of its own."""
    root = tmp_path_factory.mktemp('data')
    write_voc(root / 'VOCdevkit')
    main = root / 'VOCdevkit' / 'VOC2012' / 'ImageSets' / 'Main'
    for split in ('train', 'val'):
        (main / f'{split}.txt').write_text((main / 'trainval.txt').read_text())
    write_coco(root / 'coco', OWN_CLASSES)
    write_cityscapes(root / 'cityscapes')
    for split in ('train', 'val'):
        (root / 'imagenet' / split).mkdir(parents=True)
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'resnet18.pth'
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), path)
    return path


@pytest.mark.parametrize(
    'task, protocol', MINI, ids=[f'{t.name}-{p}' for t, p in MINI]
)
def test_trains_a_step(task, protocol, data, weights, tmp_path):
    cfg = task_config(task, protocol, data)
    set_pretrained(cfg, str(weights))
    cfg.work_dir = str(tmp_path)
    cfg.train_dataloader.batch_size = 2
    for loader in (
        cfg.train_dataloader,
        cfg.val_dataloader,
        cfg.test_dataloader,
    ):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    # Without warm-up, that a single step shows.
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint.interval = -1
    cfg.default_hooks.checkpoint.save_last = False
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
    if task.layout == 'coco':
        assert tuple(classes) == OWN_CLASSES
        assert runner.model.roi_head.bbox_head.num_classes == 18


def test_published_numbers():
    tasks = {task.name: task for task in SUITES['paper'].tasks}

    def value(task, row, metric):
        (number,) = [
            x
            for x in tasks[task].published
            if (x['row'], x['metric']) == (row, metric)
        ]
        return number['value']

    assert value('voc_det_c4', 'MoCo-v2', 'AP75') == 63.43
    assert value('voc_seg', 'DenseCL', 'mIoU') == 69.4
    assert value('coco_fpn_1x', 'DenseCL', 'mask AP') == 36.4
    assert value('voc07_svm', 'MoCo-v2', 'mAP') == 84.0
    assert not any(task.published for task in SUITES['mini'].tasks)
    assert all(x['source'] for t in tasks.values() for x in t.published)


@pytest.mark.parametrize('suite', SUITES.values(), ids=SUITES)
def test_frozen_differs_in_what_is_frozen(suite, data):
    for task in suite.tasks:
        if len(task.configs) < 2:
            continue
        frozen, tuned = (
            task_config(task, protocol, data).to_dict()
            for protocol in ('frozen', 'finetune')
        )
        for cfg in (frozen, tuned):
            cfg['model']['backbone'].pop('frozen_stages', None)
            cfg['model']['backbone'].pop('norm_eval', None)
            head = cfg['model'].get('roi_head', {}).get('shared_head')
            (head or {}).pop('frozen', None)
        assert frozen == tuned
