# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Every config of mmdet and mmseg trains a step, and is the protocol."""

import copy
import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tiny_datasets import write_cityscapes, write_coco, write_voc

from mmdensecl.engine import override_data_root, set_pretrained

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytestmark = pytest.mark.usefixtures('fast_configs')

ROOT = Path(__file__).parents[2] / 'configs' / 'benchmarks'
SHIPPED = sorted(
    str(path.relative_to(ROOT))
    for host in ('mmdet', 'mmseg')
    for path in (ROOT / host).glob('*.py')
)
# Where the weights of a ResNet are; those of a C4 detector are in two places.
BACKBONE = ('backbone.', 'roi_head.shared_head.layer')
RGB_MEAN, RGB_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# What the literature says of each, see configs/benchmarks/README.md.
DETECTION = dict(lr=0.02, weight_decay=1e-4, gpus=8, batch=2, crop=None)
VOC = dict(DETECTION, iters=24000, steps=[18000, 22000], warmup=100)
VOC.update(sides=range(480, 801, 32), classes=20)
COCO = dict(DETECTION, iters=90000, steps=[60000, 80000], warmup=1000)
COCO.update(sides=range(640, 801, 32), classes=80)
COCO_2X = dict(COCO, iters=180000, steps=[120000, 160000])
SEGMENTATION = dict(lr=0.01, weight_decay=5e-4, gpus=4)
CITYSCAPES = dict(SEGMENTATION, iters=40000, batch=2, classes=19)


def whole(*crop):
    """Training on crops, and a test on whole images."""
    return dict(crop=crop, test=dict(mode='whole'), align_corners=False)


PROTOCOLS = {
    'mmdet/faster-rcnn_r50-c4_8xb2-24k_voc0712': VOC,
    'mmdet/faster-rcnn_r50-fpn_8xb2-24k_voc0712': VOC,
    'mmdet/mask-rcnn_r50-c4_8xb2-1x_coco': COCO,
    'mmdet/mask-rcnn_r50-c4_8xb2-2x_coco': COCO_2X,
    'mmdet/mask-rcnn_r50-fpn_8xb2-1x_coco': COCO,
    'mmdet/mask-rcnn_r50-fpn_8xb2-2x_coco': COCO_2X,
    'mmdet/mask-rcnn_r50-fpn_8xb2-90k_coco-10pct': COCO,
    'mmseg/fcn_r50-d8_4xb4-20k_voc12aug-512x512': dict(
        SEGMENTATION, iters=20000, batch=4, classes=21, **whole(512, 512)
    ),
    'mmseg/fcn_r50-d8_4xb2-40k_cityscapes-769x769': dict(
        CITYSCAPES,
        crop=(769, 769),
        test=dict(mode='slide', crop_size=(769, 769), stride=(513, 513)),
        align_corners=True,
    ),
    'mmseg/fcn_r50-d8_4xb2-40k_cityscapes-512x1024': dict(
        CITYSCAPES, **whole(512, 1024)
    ),
}


@cache
def read(name: str) -> Config:
    return Config.fromfile(ROOT / name)


def load(name: str) -> Config:
    return copy.deepcopy(read(name))


def is_frozen(name: str) -> bool:
    return name.endswith('_frozen.py')


def protocol(name: str) -> SimpleNamespace:
    name = name.removesuffix('.py').removesuffix('_frozen')
    return SimpleNamespace(**PROTOCOLS[name])


def walk(node):
    """Each dict of a config, the outermost first."""
    if isinstance(node, dict):
        yield node
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            yield from walk(value)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from mmdet.datasets import CocoDataset

    root = tmp_path_factory.mktemp('data')
    write_voc(root / 'VOCdevkit')
    write_coco(root / 'coco', CocoDataset.METAINFO['classes'])
    write_cityscapes(root / 'cityscapes')
    return root


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A ResNet-50 of torchvision, no tensor of which is a default."""
    from torchvision.models import resnet50

    generator = torch.Generator().manual_seed(7)
    state = resnet50().state_dict()
    for name, x in state.items():
        if name.endswith('num_batches_tracked'):
            x.fill_(7)
        elif x.dim() == 1:  # norms, small enough for features not to explode
            x.copy_(0.2 + 0.2 * torch.rand(x.shape, generator=generator))
    path = tmp_path_factory.mktemp('weights') / 'resnet50.pth'
    torch.save(state, path)
    return path


def shrink(cfg: Config) -> None:
    """Small pictures, few proposals, one iteration; the model stays."""
    small, size = (64, 64), (96, 64)
    transforms = dict(
        Resize=dict(scale=size),
        RandomResize=dict(scale=size),
        RandomChoiceResize=dict(scales=[size]),
        RandomCrop=dict(crop_size=small),
        Pad=dict(size=small),
    )
    # A score of 0 is one to report; without any COCO has no metrics.
    few = dict(nms_pre=40, max_per_img=8, num=4, score_thr=0.0)
    for node in walk([cfg[key] for key in cfg]):
        node.update(transforms.get(node.get('type'), {}))
        node.update({k: v for k, v in few.items() if k in node})
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = small
        if cfg.model.test_cfg.mode == 'slide':
            cfg.model.test_cfg.update(crop_size=small, stride=(43, 43))
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    # One step of the warm-up would be lost in rounding.
    for scheduler in cfg.param_scheduler:
        if scheduler.type == 'LinearLR':
            scheduler.start_factor = 1.0
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)


class Snapshot(Hook):
    """Keeps the weights that a run starts from."""

    def before_train(self, runner):
        self.state = state_of(runner.model)


def state_of(model):
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


@pytest.fixture(scope='module', params=SHIPPED)
def run(request, data, checkpoint, tmp_path_factory):
    """A config, and what one step and one validation made of it."""
    tiny = load(request.param)
    folder = Path(tiny.data_root).relative_to('data')
    override_data_root(tiny, str(data / folder))
    set_pretrained(tiny, str(checkpoint))
    shrink(tiny)
    tiny.work_dir = str(tmp_path_factory.mktemp('work_dir'))
    runner = Runner.from_cfg(tiny)
    snapshot = Snapshot()
    runner.register_hook(snapshot)
    runner.train()
    scalars = runner.message_hub.log_scalars
    return SimpleNamespace(
        name=request.param,
        runner=runner,
        model=runner.model,
        before=snapshot.state,
        after=state_of(runner.model),
        scalars={k: v.current() for k, v in scalars.items()},
    )


def test_each_has_its_frozen_form():
    assert (
        sorted(f'{x}{form}.py' for x in PROTOCOLS for form in ('', '_frozen'))
        == SHIPPED
    )


class TestStep:
    def test_backbone_is_the_checkpoint(self, run, checkpoint):
        given = torch.load(checkpoint, weights_only=True)
        for name in ('fc.weight', 'fc.bias'):
            given.pop(name)
        loaded = {}
        for name, x in run.before.items():
            if name.startswith(BACKBONE):
                loaded[re.sub(r'^(backbone|.*shared_head)\.', '', name)] = x
        assert set(loaded) == set(given)  # nothing missing, nothing unused
        for name, x in given.items():
            assert torch.equal(loaded[name], x), name

    def test_what_learns(self, run):
        """All of the model, or all but the backbone, bit for bit."""
        moved = {
            name
            for name, x in run.before.items()
            if not torch.equal(x, run.after[name])
        }
        backbone = {x for x in run.before if x.startswith(BACKBONE)}
        if is_frozen(run.name):
            assert not moved & backbone
        else:
            assert {x for x in backbone if 'running' in x} <= moved
            assert {x for x in backbone if 'num_batches' in x} <= moved
            # A few gradients are lost in rounding.
            assert len(backbone - moved) < 0.05 * len(backbone)
        # Norms of the heads gather statistics in both forms.
        heads = {x for x in set(run.before) - backbone if 'running' in x}
        assert heads and heads <= moved
        if '-c4' in run.name:
            assert 'roi_head.shared_head.norm.weight' in moved
        assert any('head' in x and x.endswith('weight') for x in moved)

    def test_losses_and_metrics(self, run):
        losses = {k: v for k, v in run.scalars.items() if 'loss' in k}
        assert losses['train/loss'] > 0
        assert all(v == v and v < 1e4 for v in losses.values())
        if 'voc0712' in run.name:
            metrics = ['mAP'] + [f'AP{x}' for x in range(50, 100, 5)]
            metrics = [f'pascal_voc/{x}' for x in metrics]
        elif 'coco' in run.name:
            metrics = ['coco/bbox_mAP', 'coco/segm_mAP']
        else:
            metrics = ['mIoU']
            assert 'train/aux.loss_ce' in losses
        assert {f'val/{x}' for x in metrics} <= set(run.scalars)

    def test_preprocessor_gives_rgb(self, run):
        """From BGR as OpenCV decodes it, normalised for a torchvision net."""
        picture = torch.tensor([10, 20, 30], dtype=torch.uint8)
        picture = picture.view(3, 1, 1).expand(3, 64, 64)
        sample = run.runner.train_dataloader.dataset[0]['data_samples']
        given = run.model.data_preprocessor(
            dict(inputs=[picture], data_samples=[sample]), False
        )['inputs']
        for channel, value in enumerate((30, 20, 10)):
            expected = (value - RGB_MEAN[channel]) / RGB_STD[channel]
            found = float(given[0, channel, 5, 5])
            assert found == pytest.approx(expected, abs=1e-4)


@pytest.fixture(params=SHIPPED)
def shipped(request):
    return SimpleNamespace(
        name=request.param,
        cfg=load(request.param),
        expected=protocol(request.param),
    )


class TestProtocol:
    def test_schedule(self, shipped):
        cfg, expected = shipped.cfg, shipped.expected
        assert cfg.train_cfg.type == 'IterBasedTrainLoop'
        assert cfg.train_cfg.max_iters == expected.iters
        assert cfg.train_dataloader.batch_size == expected.batch
        total = expected.gpus * expected.batch
        assert cfg.auto_scale_lr.base_batch_size == total
        assert cfg.optim_wrapper.type == 'OptimWrapper'
        assert cfg.optim_wrapper.optimizer == dict(
            type='SGD',
            lr=expected.lr,
            momentum=0.9,
            weight_decay=expected.weight_decay,
        )
        assert all(not x.by_epoch for x in cfg.param_scheduler)
        if cfg.default_scope == 'mmdet':
            warmup, steps = cfg.param_scheduler
            assert warmup.type == 'LinearLR'
            assert warmup.start_factor == 0.001
            assert (warmup.begin, warmup.end) == (0, expected.warmup)
            assert (steps.type, steps.gamma) == ('MultiStepLR', 0.1)
            assert steps.milestones == expected.steps
        else:
            (poly,) = cfg.param_scheduler
            shape = poly.type, poly.power, poly.eta_min
            assert shape == ('PolyLR', 0.9, 1e-4)
            assert (poly.begin, poly.end) == (0, expected.iters)

    def test_pictures(self, shipped):
        cfg, expected = shipped.cfg, shipped.expected
        steps = [x for x in walk(cfg.train_dataloader) if 'type' in x]
        if expected.crop:
            crops = [x.crop_size for x in steps if x.type == 'RandomCrop']
            assert {tuple(x) for x in crops} == {expected.crop}
            # In the model, where it has an effect.
            assert tuple(cfg.model.data_preprocessor.size) == expected.crop
            return
        scales = [x.scales for x in steps if x.type == 'RandomChoiceResize']
        sides = tuple((1333, x) for x in expected.sides)
        assert {tuple(x) for x in scales} == {sides}
        test = cfg.test_dataloader.dataset.pipeline
        scales = [tuple(x.scale) for x in test if x.type == 'Resize']
        assert scales == [(1333, 800)]
        assert not any(x.type in ('Resize', 'RandomCrop') for x in steps)

    def test_model(self, shipped):
        model, expected = shipped.cfg.model, shipped.expected
        nodes = list(walk(model))
        classes = {x.num_classes for x in nodes if 'num_classes' in x}
        assert classes == {expected.classes}
        norms = {x.norm_cfg.type for x in nodes if 'norm_cfg' in x}
        assert norms == {'SyncBN'}
        if shipped.cfg.default_scope == 'mmseg':
            heads = [model.decode_head, model.auxiliary_head]
            assert [x.type for x in heads] == ['FCNHead', 'FCNHead']
            assert heads[1].loss_decode.loss_weight == 0.4
            align = {x.align_corners for x in heads}
            assert align == {expected.align_corners}
            assert model.test_cfg == expected.test
        elif '-fpn' in shipped.name:
            head = model.roi_head.bbox_head
            assert head.type == 'Shared4Conv1FCBBoxHead'
            assert model.neck.type == 'FPN'
        else:
            assert 'neck' not in model
            shared = model.roi_head.shared_head
            assert shared.type == 'mmdensecl.ResLayerExtraNorm'
            assert model.rpn_head.anchor_generator.scales == [2, 4, 8, 16, 32]

    def test_weights_are_asked_for(self, shipped):
        """Without --pretrained it stops, and says what to do."""
        cfgs = [x.get('init_cfg') for x in walk(shipped.cfg.model)]
        cfgs = [x for x in cfgs if x is not None]
        assert {x.type for x in cfgs} == {'mmdensecl.PretrainedBackbone'}
        assert len(cfgs) == 1 + ('-c4' in shipped.name)
        assert all(x.checkpoint is None for x in cfgs)


def test_voc_is_scored_like_detectron2():
    """AP over ten thresholds, each with the 11 points of VOC2007."""
    cfg = load('mmdet/faster-rcnn_r50-c4_8xb2-24k_voc0712.py')
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator.eval_mode == '11points'
        assert evaluator.iou_thrs == pytest.approx(
            [x / 100 for x in range(50, 100, 5)]
        )
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == 'ConcatDataset'
    assert [x.ann_file for x in dataset.datasets] == [
        f'VOC{year}/ImageSets/Main/trainval.txt' for year in (2007, 2012)
    ]
    assert cfg.test_dataloader.dataset.ann_file == (
        'VOC2007/ImageSets/Main/test.txt'
    )


def test_ten_percent_differs_in_its_list():
    name = 'mmdet/mask-rcnn_r50-fpn_8xb2-90k_coco-10pct.py'
    cfg = load(name)
    base = load('mmdet/mask-rcnn_r50-fpn_8xb2-1x_coco.py')
    dataset = cfg.train_dataloader.dataset
    name = 'instances_train2017_10pct_seed0.json'
    assert dataset.ann_file == f'annotations/{name}'
    dataset.ann_file = base.train_dataloader.dataset.ann_file
    assert cfg.to_dict() == base.to_dict()
