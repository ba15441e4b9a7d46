# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""One line in a host's config, and every tensor of the backbone is there."""

import hashlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import mmengine.hub
import pytest
import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import (
    BaseModel,
    ImgDataPreprocessor,
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
    @pytest.mark.parametrize(
        'host, changes',
        [
            *((host, {}) for host in HOSTS),
            ('mmdet', dict(frozen_stages=2)),
            ('mmpretrain', dict(zero_init_residual=True)),
            ('mmseg', dict(norm_cfg=dict(type='SyncBN', requires_grad=True))),
            (
                'mmdet',
                dict(
                    num_stages=3,
                    strides=(1, 2, 2),
                    dilations=(1, 1, 1),
                    out_indices=(2,),
                ),
            ),
        ],
    )
    def test_equals_the_file(self, host, changes, file18, backbone18):
        """Also as the last of a list of initialisers."""
        init_cfg = [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer='_BatchNorm'),
            ours(file18),
        ]
        for own in (init_cfg, ours(file18)):
            model = build(host, resnet(own, **changes))
            count = assert_equals_file(model, backbone18)
            assert count == (90 if 'num_stages' in changes else 120)

    @pytest.mark.parametrize('kind', ['Kaiming', 'Pretrained'])
    def test_no_other_may_follow(self, kind, file18):
        other = dict(type=kind, checkpoint='other.pth')
        for init_cfg in ([ours(file18), other], [other, ours(file18)]):
            if kind == 'Pretrained' or init_cfg[1] == other:
                with pytest.raises(ValueError, match='must be the last of'):
                    build('mmpretrain', resnet(init_cfg))

    def test_deformable_convolutions(self, file50, backbone50, log):
        """Their own init_weights would draw the loaded weights anew."""
        config = resnet(
            ours(file50),
            depth=50,
            dcn=DCN,
            stage_with_dcn=(False, False, False, True),
        )
        with pytest.raises(ValueError, match='would stay random.*conv_offset'):
            build('mmdet', config)
        config['init_cfg']['allow_random'] = ['conv_offset']
        state = build('mmdet', config).state_dict()
        offsets = [name for name in state if 'conv_offset' in name]
        assert len(offsets) == 6
        for name, x in state.items():
            expected = 0 * x if name in offsets else backbone50[name]
            assert torch.equal(x, expected), name
        line = find(log, 'loaded 318/324')
        assert 'allow_random permits: layer4.0.conv2.conv_offset' in line

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


# Stock config, keys of the backbone to change, other changes.
STOCK = [
    ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', {}),
    (
        'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
        dict(style='pytorch'),
    ),
    (
        'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024'
        '.py',
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
    @pytest.mark.parametrize(
        'arguments, words',
        [
            (dict(checkpoint=None), '--pretrained FILE'),
            (dict(checkpoint=''), '--pretrained FILE'),
            *(
                (dict(checkpoint='a', sha256=x), '8 to 64 hexadecimal digits')
                for x in ('', 'abcdef0', 'x' * 8, 'a' * 65, 12)
            ),
        ],
    )
    def test_arguments(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            PretrainedBackbone(**arguments)

    @pytest.mark.parametrize(
        'host, source, changes, words',
        [
            ('mmseg', {}, dict(type='ResNetV1c'), 'stem.0.*is ResNetV1c-18'),
            (
                'mmseg',
                dict(type='ResNetV1c'),
                {},
                'The file is ResNetV1c-18 with',
            ),
            (
                'mmdet',
                {},
                dict(depth=34),
                'not in the file, would stay random.*'
                'is ResNet-18.*, the module is ResNet-34',
            ),
            # Each tensor of the module is there, and yet it is wrong.
            ('mmdet', dict(depth=34), {}, 'without a place.*layer1.2'),
            (
                'mmdet',
                {},
                dict(in_channels=4),
                r'1 of another shape or type, would stay random: conv1.weight'
                r': got \(8, 3, 7, 7\), expected \(8, 4, 7, 7\)',
            ),
        ],
    )
    def test_another_network(self, host, source, changes, words, tmp_path):
        """It is named, and nothing is loaded before."""
        pytest.importorskip(host)
        small = dict(type='ResNet', depth=18, stem_channels=8, base_channels=8)
        with DefaultScope.overwrite_default_scope(host):
            torch.save(
                MODELS.build(small | source).state_dict(), tmp_path / 'a.pth'
            )
            module = MODELS.build(small | changes)
        before = {k: v.clone() for k, v in module.state_dict().items()}
        with pytest.raises(ValueError, match=f'(?s){words}'):
            PretrainedBackbone(str(tmp_path / 'a.pth'))(module)
        assert_equals_file(module, before)

    def test_shape_that_may_be_random(self, file18, backbone18, log):
        for leave in (dict(allow_random='conv1.weight'), dict(strict=False)):
            model = build(
                'mmdet', resnet(ours(file18, **leave), in_channels=4)
            )
            assert torch.equal(model.bn1.weight, backbone18['bn1.weight'])
        warning = next(line for level, line in log if level == 'WARNING')
        assert 'loaded 119/120' in warning and 'conv1.weight' in warning

    @pytest.mark.parametrize(
        'name, dtype',
        [
            ('table', torch.int8),
            ('table', torch.bool),
            ('table', torch.complex64),
            ('table', torch.float8_e5m2),
            ('index', torch.bool),
        ],
    )
    def test_type(self, name, dtype, tmp_path):
        """Under a name that no weight has elsewhere."""
        module = nn.Module()
        module.table = nn.Parameter(torch.rand(4))
        module.index = nn.Parameter(torch.arange(4), requires_grad=False)
        state = {k: v.detach() + 1 for k, v in module.state_dict().items()}
        path = str(tmp_path / 'a.pth')
        torch.save({f'backbone.{k}': v for k, v in state.items()}, path)
        PretrainedBackbone(path)(module)
        assert_equals_file(module, state)
        state[name] = state[name].to(dtype)
        torch.save({f'backbone.{k}': v for k, v in state.items()}, path)
        with pytest.raises(ValueError, match=name):
            PretrainedBackbone(path)(module)

    def test_counters_may_be_missing(self, backbone18, tmp_path, log):
        old = {k: v for k, v in backbone18.items() if 'num_batches' not in k}
        torch.save(old, tmp_path / 'old.pth')
        model = build('mmdet', resnet(ours(str(tmp_path / 'old.pth'))))
        assert torch.equal(model.conv1.weight, backbone18['conv1.weight'])
        assert 'stay at 0: bn1.num_batches_tracked' in find(
            log, 'loaded 100/120'
        )


def test_log_and_sha256(file18, log):
    sha256 = hashlib.sha256(Path(file18).read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=f'got sha256 {sha256}, expected 0123abcd'
    ):
        build('mmdet', resnet(ours(file18, sha256='0123abcd')))
    build('mmdet', resnet(ours(file18, sha256=sha256[:8].upper())))
    line = find(log, 'loaded 120/120 tensors of ResNet-18')
    assert 'C4' not in line
    assert f'from "{file18}" (sha256 ' in line
    assert 'torchvision or timm classifier' in line
    # mmengine's own list of where each parameter came from.
    origin = find(log, 'layer1.0.conv1.weight - ')
    assert f'PretrainedBackbone: "{file18}"' in origin


def test_allow_random_must_match(file18):
    config = resnet(ours(file18, allow_random=['conv1', 'foo', 'conv']))
    with pytest.raises(ValueError, match='2 of allow_random .*: foo, conv\n'):
        build('mmdet', config)


def test_what_will_not_train(file18, log):
    """And a stem that no training would ever change is an error."""
    for changes, expected in (
        (dict(frozen_stages=1, norm_eval=True), 'conv1, bn1, layer1; in'),
        (dict(frozen_stages=0, norm_eval=False), 'conv1, bn1'),
        (dict(norm_eval=False), None),
    ):
        build('mmdet', resnet(ours(file18), **changes))
        line = find(log, 'loaded 120/120')
        assert 'layer2' not in line
        assert ('norm_eval=True: batch norms' in line) == changes['norm_eval']
        if expected:
            assert f'will not train, frozen: {expected}' in line
        else:
            assert 'will not train' not in line
    for names in ('conv1.weight', ['bn1', 'conv1']):
        config = resnet(ours(file18, allow_random=names), in_channels=4)
        build('mmdet', dict(config, frozen_stages=-1))
        with pytest.raises(
            ValueError, match='1 random and frozen.*conv1.weight'
        ):
            build('mmdet', dict(config, frozen_stages=1))


class Model(BaseModel):
    def forward(self, *args, **kwargs):
        raise NotImplementedError


RGB = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
GOOD = dict(RGB, bgr_to_rgb=True)
REFLECT = dict(conv_cfg=dict(type='Conv2d', padding_mode='reflect'))


@pytest.mark.parametrize('run, preprocessor, changes, words', [
    ({}, GOOD, {}, None),
    (dict(backbone=dict(strides=[1, 2, 2, 2])), GOOD, {}, None),
    # Dilated, the strides are others, but not the cells' size.
    ({}, GOOD, dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)), None),
    (dict(backbone=dict(strides=[1, 1, 1, 2])), GOOD, {},
     r'one cell in \(1, 1, 1, 2\) pixels.*\(1, 2, 4, 8\) here'),
    (dict(backbone=REFLECT), GOOD, REFLECT, None),
    (dict(backbone=REFLECT), GOOD, {},
     "padding_mode='reflect', .* here have 'zeros'"),
    ({}, GOOD, REFLECT, "padding_mode='zeros', .* here have 'reflect'"),
    ({}, dict(mean=RGB['mean'][::-1], std=[1.0, 1.0, 1.0]), {},
     'trained on RGB images of std.*data_preprocessor here has'),
    ({}, {}, {}, 'trained on RGB images of mean'),
    ({}, RGB, {}, 'here leaves them BGR'),
])  # fmt: skip
def test_how_it_was_trained(
    backbone18, tmp_path, log, run, preprocessor, changes, words
):
    """A published file is compared with the model that it enters."""
    meta = dict(mmdensecl=dict(run=dict(RGB, method='DenseCL') | run))
    path = str(tmp_path / 'published.pth')
    torch.save(dict(state_dict=backbone18, meta=meta), path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        backbone = MODELS.build(resnet(ours(path), **changes))
    model = Model(ImgDataPreprocessor(**preprocessor))
    model.backbone = backbone
    model.init_weights()
    text = '\n'.join(line for _, line in log)
    if words:
        assert re.search(words, text)
    else:
        assert ' here' not in text


def test_our_own_pipelines_load_rgb(tiny_cfg, backbone18, tmp_path, log):
    """A pre-training that starts from another needs no bgr_to_rgb."""
    path = str(tmp_path / 'published.pth')
    meta = dict(mmdensecl=dict(run=dict(RGB, method='DenseCL')))
    torch.save(dict(state_dict=backbone18, meta=meta), path)
    config = tiny_cfg(
        data_preprocessor=RGB,
        backbone=dict(type='mmpretrain.ResNet', depth=18, init_cfg=ours(path)),
    )
    config['neck'].update(in_channels=512)
    build('mmpretrain', config)
    assert 'loaded 120/120' in str(log) and ' here' not in str(log)


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
