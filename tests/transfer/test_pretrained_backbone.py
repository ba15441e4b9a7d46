# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""One line in a host's config, and every tensor of the backbone is there."""

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import mmengine.hub
import pytest
import torch
import torch.nn as nn
import torchvision
from mmengine.logging import MMLogger
from mmengine.model import (
    BaseModel,
    BaseModule,
    ImgDataPreprocessor,
    Sequential,
)
from mmengine.registry import MODELS, DefaultScope

from mmdensecl.transfer import PretrainedBackbone

HOSTS = ['mmdet', 'mmseg', 'mmpretrain']
DCN = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)


def ours(path, **kwargs):
    return dict(type='mmdensecl.PretrainedBackbone', checkpoint=path, **kwargs)


def build(host, config):
    """Built and initialised in the host's scope, like by its Runner."""
    with DefaultScope.overwrite_default_scope(host):
        pytest.importorskip(host)
        model = MODELS.build(config)
        model.init_weights()
    return model


def resnet(init_cfg, **kwargs):
    return {**dict(type='ResNet', depth=18, init_cfg=init_cfg), **kwargs}


def assert_equals_file(module, expected):
    state = module.state_dict()
    for name, x in state.items():
        assert torch.equal(x, expected[name]), name
    return len(state)


@pytest.fixture
def log(request):
    """What mmengine's current logger says; a new one without a file."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append((record.levelname, record.getMessage()))

    logger, handler = MMLogger.get_instance(request.node.name), Handler()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


class TestHosts:
    @pytest.mark.parametrize('host', HOSTS)
    @pytest.mark.parametrize(
        'changes',
        [
            dict(),
            dict(zero_init_residual=True),
            dict(frozen_stages=2),
            dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
            dict(
                num_stages=3,
                strides=(1, 2, 2),
                dilations=(1, 1, 1),
                out_indices=(2,),
            ),
        ],
    )
    def test_equals_the_file(self, host, changes, file18, backbone18):
        model = build(host, resnet(ours(file18), **changes))
        count = assert_equals_file(model, backbone18)
        assert count == (90 if 'num_stages' in changes else 120)

    @pytest.mark.parametrize('host', HOSTS)
    def test_last_of_a_list(self, host, file18, backbone18):
        init_cfg = [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer='_BatchNorm'),
            ours(file18),
        ]
        model = build(host, resnet(init_cfg))
        assert assert_equals_file(model, backbone18) == 120

    @pytest.mark.parametrize(
        'others',
        [
            [dict(type='Kaiming', layer='Conv2d')],
            [dict(type='Pretrained', checkpoint='other.pth')],
        ],
    )
    @pytest.mark.parametrize('first', [True, False])
    def test_no_other_may_follow(self, others, first, file18):
        if first and others[0]['type'] == 'Kaiming':
            others = others + [ours(file18)] + others
        else:
            others = [ours(file18), *others]
            others = others[::-1] if first else others
        with pytest.raises(ValueError, match='must be the last of init_cfg'):
            build('mmpretrain', resnet(others))

    @pytest.mark.parametrize('host', ['mmdet', 'mmseg'])
    def test_deformable_convolutions(self, host, file50, backbone50, log):
        """Their own init_weights would draw the loaded weights anew."""
        config = resnet(
            ours(file50, allow_random=['conv_offset']),
            depth=50,
            dcn=DCN,
            stage_with_dcn=(False, False, False, True),
        )
        state = build(host, config).state_dict()
        offsets = [name for name in state if 'conv_offset' in name]
        assert len(offsets) == 6
        for name, x in state.items():
            expected = 0 * x if name in offsets else backbone50[name]
            assert torch.equal(x, expected), name
        line = find(log, 'loaded 318/324')
        assert 'allow_random permits: layer4.0.conv2.conv_offset' in line

    def test_deformable_convolutions_need_leave(self, file50):
        config = resnet(
            ours(file50),
            depth=50,
            dcn=DCN,
            stage_with_dcn=(False, False, False, True),
        )
        with pytest.raises(ValueError, match='would stay random.*conv_offset'):
            build('mmdet', config)

    def test_plugin(self, file50, backbone50):
        config = resnet(
            ours(file50, allow_random='context_block.*'),
            depth=50,
            plugins=[
                dict(
                    cfg=dict(type='ContextBlock', ratio=1 / 16),
                    stages=(False, False, False, True),
                    position='after_conv3',
                )
            ],
        )
        state = build('mmdet', config).state_dict()
        loaded = [name for name in state if 'context_block' not in name]
        assert len(loaded) == 318 < len(state)
        for name in loaded:
            assert torch.equal(state[name], backbone50[name]), name

    def test_pre_training_starts_from_it(self, tiny_cfg, file18, backbone18):
        """Both encoders."""
        config = tiny_cfg(
            backbone=dict(
                type='mmpretrain.ResNet', depth=18, init_cfg=ours(file18)
            )
        )
        config['neck'].update(in_channels=512)
        model = build('mmpretrain', config)
        assert_equals_file(model.backbone, backbone18)
        assert_equals_file(model.encoder_k.backbone, backbone18)


class Redrawn(nn.Conv2d):
    """Like a deformable convolution, without mmengine's is_init."""

    def init_weights(self):
        self.weight.data.zero_()


class Net(BaseModule):
    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.conv1 = Redrawn(3, 64, 7, bias=False)
        self.extra = Sequential(
            nn.Linear(2, 2),
            init_cfg=dict(type='Constant', layer='Linear', val=3.0),
        )


def test_own_initialisation_first(file18, backbone18):
    """What the file lacks is initialised, what it has is not overwritten."""
    net = Net(ours(file18, allow_random='extra'))
    Sequential(net).init_weights()
    assert torch.equal(net.conv1.weight, backbone18['conv1.weight'])
    assert net.extra[0].weight.eq(3).all()


# Stock config, keys of the backbone to change, other changes.
STOCK = [
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', {}),
    (
        'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        dict(style='pytorch'),
    ),
    ('mmdet::atss/atss_r50_fpn_1x_coco.py', {}),
    ('mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', {}),
    (
        'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024'
        '.py',
        dict(type='ResNet'),
    ),
    (
        'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py',
        dict(type='ResNet'),
    ),
    ('mmpretrain::resnet/resnet50_8xb32_in1k.py', {}),
]


class TestStockConfigs:
    @pytest.mark.parametrize('name, changes', STOCK)
    def test_one_line(self, name, changes, file50, backbone50, log):
        host = name.partition(':')[0]
        pytest.importorskip(host)
        config = mmengine.hub.get_config(name).model
        config.pop('pretrained', None)
        config.backbone.update(init_cfg=ours(file50), **changes)
        model = build(host, config)
        assert assert_equals_file(model.backbone, backbone50) == 318
        assert "DenseCL authors' released weights" in find(
            log, 'loaded 318/318 tensors of ResNet-50 into ResNet'
        )
        assert not any('caffe' in line for _, line in log)

    @pytest.mark.parametrize('depth, warned', [(50, True), (18, False)])
    def test_caffe_strides_are_told(self, depth, warned, file50, file18, log):
        """Same shapes, other strides: only a warning can tell."""
        build(
            'mmdet',
            resnet(
                ours(file50 if depth == 50 else file18),
                depth=depth,
                style='caffe',
            ),
        )
        assert any("style='caffe'" in line for _, line in log) == warned

    def test_c4_detector(self, file18, backbone18, log):
        pytest.importorskip('mmdet')
        config = mmengine.hub.get_config(
            'mmdet::faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py'
        ).model
        config.backbone.update(
            depth=18, style='pytorch', init_cfg=ours(file18)
        )
        config.rpn_head.in_channels = 256
        config.roi_head.bbox_roi_extractor.out_channels = 256
        config.roi_head.shared_head.update(depth=18, init_cfg=ours(file18))
        config.roi_head.shared_head.pop('pretrained', None)
        config.roi_head.bbox_head.in_channels = 512
        model = build('mmdet', config)
        counts = [
            assert_equals_file(part, backbone18)
            for part in (model.backbone, model.roi_head.shared_head)
        ]
        assert counts == [90, 30]
        line = find(log, 'loaded 90/90')
        assert 'not needed: layer4, fc' in line
        assert 'roi_head.shared_head has layer4' in line
        assert 'into ResLayer' in find(log, 'loaded 30/30')


def find(log, text):
    lines = [line for _, line in log if text in line]
    assert lines, log
    return lines[-1]


class TestErrors:
    @pytest.mark.parametrize('checkpoint', [None, ''])
    def test_no_checkpoint(self, checkpoint):
        with pytest.raises(ValueError, match='--pretrained FILE'):
            PretrainedBackbone(checkpoint)

    @pytest.mark.parametrize('sha256', ['', 'abcdef0', 'x' * 8, 'a' * 65, 12])
    def test_no_sha256(self, sha256):
        with pytest.raises(ValueError, match='8 to 64 hexadecimal digits'):
            PretrainedBackbone('a.pth', sha256=sha256)

    def test_another_file(self, file18):
        pytest.importorskip('mmdet')
        module = MODELS.build(dict(type='mmdet.ResNet', depth=18))
        sha256 = hashlib.sha256(Path(file18).read_bytes()).hexdigest()
        with pytest.raises(
            ValueError, match=f'got sha256 {sha256}, expected 0123abcd'
        ):
            PretrainedBackbone(file18, sha256='0123abcd')(module)

    def test_v1c(self, file50):
        with pytest.raises(ValueError) as error:
            build('mmseg', resnet(ours(file50), type='ResNetV1c', depth=50))
        text = str(error.value)
        assert 'stem.0.weight' in text
        assert 'is ResNet-50, the module is ResNetV1c-50' in text

    def test_file_is_v1c(self, tmp_path):
        pytest.importorskip('mmseg')
        source = MODELS.build(
            dict(type='mmseg.ResNetV1c', depth=18, base_channels=8)
        )
        torch.save(source.state_dict(), tmp_path / 'v1c.pth')
        with pytest.raises(ValueError, match='The file is ResNetV1c-18 with'):
            build(
                'mmseg',
                resnet(ours(str(tmp_path / 'v1c.pth')), base_channels=8),
            )

    @pytest.mark.parametrize('depth', [34, 50])
    def test_deeper_module(self, depth, file18):
        with pytest.raises(ValueError) as error:
            build('mmdet', resnet(ours(file18), depth=depth))
        text = str(error.value)
        assert f'The file is ResNet-18, the module is ResNet-{depth}' in text
        assert 'not in the file, would stay random' in text

    def test_deeper_file(self, tmp_path):
        """Each tensor of the module is there, and yet it is wrong."""
        pytest.importorskip('mmdet')
        kwargs = dict(stem_channels=8, base_channels=8)
        source = MODELS.build(dict(type='mmdet.ResNet', depth=101, **kwargs))
        torch.save(source.state_dict(), tmp_path / 'r101.pth')
        with pytest.raises(ValueError, match='without a place.*layer3.6'):
            build(
                'mmdet',
                resnet(ours(str(tmp_path / 'r101.pth')), depth=50, **kwargs),
            )

    def test_shape(self, file18):
        with pytest.raises(ValueError) as error:
            build('mmdet', resnet(ours(file18), in_channels=4))
        assert (
            '1 of another shape or type, would stay random: conv1.weight: got '
            '(64, 3, 7, 7) torch.float32, expected (64, 4, 7, 7)'
        ) in str(error.value)

    def test_shape_that_may_be_random(self, file18, backbone18):
        model = build(
            'mmdet',
            resnet(ours(file18, allow_random='conv1.weight'), in_channels=4),
        )
        assert torch.equal(model.bn1.weight, backbone18['bn1.weight'])

    @pytest.mark.parametrize(
        'dtype', [torch.int8, torch.bool, torch.complex64, torch.float8_e5m2]
    )
    def test_type(self, dtype, tmp_path):
        """Under a name that no weight has elsewhere."""
        module = nn.Module()
        module.table = nn.Parameter(torch.rand(4))
        module.index = nn.Parameter(torch.arange(4), requires_grad=False)
        module.other = nn.Parameter(torch.rand(4))
        state = {k: v.detach() + 1 for k, v in module.state_dict().items()}
        torch.save(
            {f'backbone.{k}': v for k, v in state.items()},
            tmp_path / 'good.pth',
        )
        PretrainedBackbone(str(tmp_path / 'good.pth'))(module)
        assert_equals_file(module, state)
        state['table'] = state['table'].to(dtype)
        torch.save(
            {f'backbone.{k}': v for k, v in state.items()},
            tmp_path / 'bad.pth',
        )
        with pytest.raises(ValueError, match='table'):
            PretrainedBackbone(str(tmp_path / 'bad.pth'))(module)
        state['table'] = (
            state['table'].abs().to(torch.float16)
            if (dtype is torch.complex64)
            else state['table'].to(torch.float16)
        )
        state['index'] = state['index'].bool()
        torch.save(
            {f'backbone.{k}': v for k, v in state.items()},
            tmp_path / 'bad.pth',
        )
        with pytest.raises(
            ValueError,
            match='1 of another shape or type.*index: got .*'
            r'torch.bool, expected \(4,\) torch.int64',
        ):
            PretrainedBackbone(str(tmp_path / 'bad.pth'))(module)

    @pytest.mark.parametrize(
        'kwargs',
        [
            dict(allow_random='conv1.weight'),
            dict(allow_random=['bn1', 'conv1']),
        ],
    )
    def test_random_and_frozen(self, file18, kwargs):
        """A stem that no training would ever change."""
        config = resnet(ours(file18, **kwargs), in_channels=4)
        build('mmdet', dict(config, frozen_stages=-1))
        with pytest.raises(
            ValueError, match='1 random and frozen.*conv1.weight'
        ):
            build('mmdet', dict(config, frozen_stages=1))

    def test_whole_model(self, file18):
        config = dict(
            type='ImageClassifier',
            backbone=dict(type='ResNet', depth=18),
            init_cfg=ours(file18),
        )
        with pytest.raises(ValueError, match='put init_cfg into its backbone'):
            build('mmpretrain', config)

    def test_nothing_is_loaded_before_it_raises(self, file18):
        pytest.importorskip('mmdet')
        module = MODELS.build(
            dict(type='mmdet.ResNet', depth=18, in_channels=4)
        )
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(ValueError):
            PretrainedBackbone(file18)(module)
        assert_equals_file(module, before)

    def test_missing_counters_are_fine(self, backbone18, tmp_path, log):
        path = tmp_path / 'old.pth'
        torch.save(
            {
                k: v
                for k, v in backbone18.items()
                if not k.endswith('num_batches_tracked')
            },
            path,
        )
        model = build('mmdet', resnet(ours(str(path))))
        assert torch.equal(model.conv1.weight, backbone18['conv1.weight'])
        assert 'stay at 0: bn1.num_batches_tracked' in find(
            log, 'loaded 100/120'
        )

    def test_not_strict(self, file18, backbone18, log):
        model = build(
            'mmdet', resnet(ours(file18, strict=False), in_channels=4)
        )
        assert torch.equal(model.bn1.weight, backbone18['bn1.weight'])
        warning = next(line for level, line in log if level == 'WARNING')
        assert 'loaded 119/120' in warning and 'conv1.weight' in warning

    def test_nothing_fits(self, file18):
        module = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match='weight, bias'):
            PretrainedBackbone(file18, strict=False)(module)


@pytest.mark.parametrize('digits', [8, 64])
def test_sha256(file18, backbone18, digits):
    sha256 = hashlib.sha256(Path(file18).read_bytes()).hexdigest()
    model = build(
        'mmdet', resnet(ours(file18, sha256=sha256[:digits].upper()))
    )
    assert assert_equals_file(model, backbone18) == 120


def test_log_and_init_info(file18, log):
    build('mmdet', resnet(ours(file18)))
    line = find(log, 'loaded 120/120 tensors of ResNet-18')
    assert 'C4' not in line
    assert f'from "{file18}" (sha256 ' in line
    assert 'torchvision or timm classifier' in line
    # mmengine's own list of where each parameter came from.
    origin = find(log, 'layer1.0.conv1.weight - ')
    assert f'PretrainedBackbone: "{file18}"' in origin


@pytest.mark.parametrize(
    'changes, expected',
    [
        (
            dict(frozen_stages=1, norm_eval=True),
            'will not train, frozen: conv1, bn1, layer1; in',
        ),
        (
            dict(frozen_stages=0, norm_eval=False),
            'will not train, frozen: conv1, bn1',
        ),
        (dict(norm_eval=False), None),
    ],
)
def test_what_will_not_train(file18, log, changes, expected):
    build('mmdet', resnet(ours(file18), **changes))
    line = find(log, 'loaded 120/120')
    if expected is None:
        assert 'will not train' not in line and 'norm_eval' not in line
    else:
        assert expected in line and 'layer2' not in line
        assert ('norm_eval=True: batch norms' in line) == changes['norm_eval']


class Model(BaseModel):
    def forward(self, *args, **kwargs):
        raise NotImplementedError


class TestHowItWasTrained:
    """A published file is compared with the model that it enters."""

    MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]

    @pytest.fixture
    def published(self, backbone18, tmp_path):
        def write(strides=None, **run):
            run = dict(method='DenseCL', mean=self.MEAN, std=self.STD) | run
            if strides:
                run['backbone'] = dict(strides=strides)
            path = tmp_path / 'published.pth'
            meta = dict(mmdensecl=dict(run=run))
            torch.save(dict(state_dict=backbone18, meta=meta), path)
            return str(path)

        return write

    def enter(self, path, scope='mmdet', preprocessor=None, **changes):
        normalisation = dict(mean=self.MEAN, std=self.STD)
        preprocessor = normalisation if preprocessor is None else preprocessor
        with DefaultScope.overwrite_default_scope(scope):
            backbone = MODELS.build(resnet(ours(path), **changes))
        model = Model(ImgDataPreprocessor(**preprocessor))
        model.backbone = backbone
        model.init_weights()

    def test_alike(self, published, log):
        self.enter(published())
        self.enter(published(strides=[1, 2, 2, 2]))
        assert not any(' here' in text for _, text in log)

    def test_dilated_is_alike(self, published, log):
        pytest.importorskip('mmseg')
        self.enter(
            published(),
            'mmseg',
            strides=(1, 2, 1, 1),
            dilations=(1, 1, 2, 4),
        )
        assert not any(' here' in text for _, text in log)

    def test_strides(self, published, log):
        self.enter(published(strides=[1, 1, 1, 2]))
        line = find(log, 'were trained at one cell in (1, 1, 1, 2) pixels')
        assert '(1, 2, 4, 8) here' in line

    @pytest.mark.parametrize(
        'preprocessor, what',
        [
            (dict(mean=[103.53, 116.28, 123.675], std=[1, 1, 1]), 'std'),
            ({}, 'mean'),
        ],
    )
    def test_normalisation(self, published, log, preprocessor, what):
        self.enter(published(), preprocessor=preprocessor)
        line = find(log, f'trained on RGB images of {what}')
        assert 'data_preprocessor here has' in line

    def test_nothing_is_known(self, file18, log):
        self.enter(file18, preprocessor={}, strides=(1, 1, 1, 1))
        assert not any(' here' in text for _, text in log)


def test_timm(tmp_path):
    """The names of mmpretrain's wrapper of timm's models are left out."""
    pytest.importorskip('timm')
    from mmpretrain.models import TIMMBackbone

    source, target = (TIMMBackbone('resnet18') for _ in range(2))
    state = {f'backbone.{k}': x for k, x in source.state_dict().items()}
    path = str(tmp_path / 'timm.pth')
    torch.save(dict(state_dict=state), path)
    PretrainedBackbone(path)(target)
    for name, x in target.state_dict().items():
        assert torch.equal(x, source.state_dict()[name])


def test_without_custom_imports(file18, tmp_path):
    """In a fresh interpreter, where nothing has imported mmdensecl yet."""
    pytest.importorskip('mmseg')
    code = f"""
import sys, torch
from mmengine.registry import MODELS, init_default_scope
init_default_scope('mmseg')
assert 'mmdensecl' not in sys.modules
model = MODELS.build(dict(type='ResNet', depth=18, init_cfg=dict(
    type='mmdensecl.PretrainedBackbone', checkpoint={file18!r})))
model.init_weights()
expected = torch.load({file18!r})
assert all(torch.equal(x, expected[k]) for k, x in model.state_dict().items())
"""
    subprocess.run([sys.executable, '-c', code], check=True, cwd=tmp_path)


def test_outside_init_weights(resnet18, file18):
    """As a plain function, on any module with those names."""
    model = torchvision.models.resnet18()
    PretrainedBackbone(file18, allow_random='fc')(model)
    images = torch.rand(1, 3, 32, 32)
    model.fc = resnet18.fc
    assert torch.equal(model.eval()(images), resnet18(images))
