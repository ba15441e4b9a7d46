# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Each backbone of mmpretrain that gives a map goes the whole way.

It pre-trains, is published, and loads into its twins in the host toolboxes.
"""

import mmpretrain.models.backbones as installed
import pytest
import torch
from mmengine.registry import MODELS as HOST_MODELS
from mmpretrain.structures import DataSample

from mmdensecl import load_backbone
from mmdensecl.models.modules import last_map
from mmdensecl.registry import MODELS
from mmdensecl.transfer import PretrainedBackbone, read_backbone
from mmdensecl.transfer.architecture import name_in_twin
from mmdensecl.transfer.convert import encode_backbone

SIDE = 64
RESNET = dict(depth=18, stem_channels=16, base_channels=16)
STAGES = dict(depths=[1] * 4, channels=[8, 16, 32, 64])
PYRAMID = dict(
    embed_dims=[8, 16, 16, 16],
    depths=[1] * 4,
    num_heads=[1] * 4,
    patch_sizes=[4, 2, 2, 2],
    strides=[4, 2, 2, 2],
    mlp_ratios=[1] * 4,
)
WINDOWS = dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4)
VIT = dict(
    arch=dict(
        embed_dims=16, num_layers=1, num_heads=1, feedforward_channels=16
    ),
    img_size=SIDE,
    out_type='featmap',
)
MAPS = dict(
    ResNet=RESNET,
    ResNetV1c=RESNET,
    ResNetV1d=RESNET,
    ResNet_CIFAR=RESNET,
    ResNeXt=dict(depth=50, groups=4, width_per_group=4, base_channels=8),
    SEResNet=dict(depth=50, stem_channels=16, base_channels=16),
    VGG=dict(depth=11),
    ShuffleNetV2=dict(widen_factor=0.5),
    MobileNetV2=dict(widen_factor=0.25),
    ConvNeXt=dict(arch=STAGES, gap_before_final_norm=False),
    ConvMixer=dict(
        arch=dict(embed_dims=16, depth=2, patch_size=7, kernel_size=9)
    ),
    SwinTransformer=dict(arch=WINDOWS, window_size=2, img_size=SIDE),
    PCPVT=dict(arch=PYRAMID | dict(sr_ratios=[8, 4, 2, 1])),
    SVT=dict(
        arch=PYRAMID | dict(sr_ratios=[4, 2, 2, 1], window_sizes=[2] * 4)
    ),
    VisionTransformer=VIT,
    DistilledVisionTransformer=VIT,
    HRNet=dict(arch='w18'),
    TIMMBackbone=dict(model_name='resnet18', features_only=True),
)
# As well, but they take longer, or are of no toolbox but mmpretrain.
SLOW = dict(
    RegNet=dict(arch='regnetx_400mf'),
    ResNeSt=dict(depth=50, base_channels=16),
    SEResNeXt=dict(depth=50, groups=4, width_per_group=4, base_channels=16),
    Res2Net=dict(depth=50, scales=4, base_width=4),
    ShuffleNetV1=dict(),
    MobileNetV3=dict(arch='small'),
    RepVGG=dict(arch='A0'),
    AlexNet=dict(),
    EfficientNet=dict(arch='b0'),
    EfficientNetV2=dict(arch='s'),
    EdgeNeXt=dict(arch='xxsmall', gap_before_final_norm=False),
    CSPDarkNet=dict(depth=53),
    CSPResNet=dict(depth=50),
    CSPResNeXt=dict(depth=50),
    RepLKNet=dict(
        arch=dict(
            large_kernel_sizes=[3] * 4,
            layers=[1] * 4,
            channels=[8, 16, 32, 64],
            small_kernel=3,
            dw_ratio=1,
        )
    ),
    RepMLPNet=dict(arch='base', img_size=SIDE),
    DenseNet=dict(arch=dict(growth_rate=4, depths=[1] * 4, init_channels=8)),
    VAN=dict(
        arch=dict(
            embed_dims=[16, 16, 32, 32], depths=[1] * 4, ffn_ratios=[1] * 4
        )
    ),
    MViT=dict(
        arch=dict(
            embed_dims=16, num_layers=2, num_heads=1, downscale_indices=[1]
        )
    ),
    HorNet=dict(
        arch=dict(
            base_dim=8,
            depths=[1] * 4,
            orders=[2] * 4,
            dw_cfg=[dict(type='DW', kernel_size=7)] * 4,
        ),
        gap_before_final_norm=False,
    ),
    SwinTransformerV2=dict(
        arch=WINDOWS | dict(extra_norm_every_n_blocks=0),
        window_size=[2] * 4,
        img_size=SIDE,
    ),
    DeiT3=VIT,
    BEiTViT=VIT,
    RevVisionTransformer=VIT,
    MobileViT=dict(arch='xx_small'),
    MobileOne=dict(arch='s0'),
    RIFormer=dict(arch='s12'),
    DaViT=dict(arch=WINDOWS, pad_small_map=True),
    TinyViT=dict(
        arch='5m', img_size=(SIDE, SIDE), gap_before_final_norm=False
    ),
    LeViT=dict(arch='128s', img_size=SIDE),
    XCiT=dict(
        patch_size=16,
        embed_dims=16,
        depth=1,
        num_heads=1,
        mlp_ratio=1.0,
        img_size=SIDE,
        out_type='featmap',
    ),
    HiViT=dict(arch='tiny', img_size=SIDE),
    ViTEVA02=VIT | dict(arch=VIT['arch'] | dict(embed_dims=64)),
)
# These give no map, need other images than 64 x 64 RGB, or are made for
# masked images or for labels; and in PoolFormer's backward pass torch 2.11
# crashes on a CPU, where channels come last.
OTHERS = {
    'PoolFormer',
    *('LeNet5', 'TNT', 'T2T_ViT', 'MlpMixer', 'Conformer', 'CSPNet'),
    *('InceptionV3', 'EfficientFormer', 'Vig', 'PyramidVig', 'ViTSAM'),
    *('MixMIMTransformer', 'SparseResNet', 'SparseConvNeXt'),
}
HRNET_W18 = {
    f'stage{i + 1}': dict(
        num_modules=modules,
        num_branches=i + 1,
        block='BASIC' if i else 'BOTTLENECK',
        num_blocks=(4,) * (i + 1),
        num_channels=tuple(18 << j for j in range(i + 1)) if i else (64,),
    )
    for i, modules in enumerate((1, 1, 4, 3))
}
# The same network in the other toolboxes, by the names of its settings there.
TWINS = [
    ('mmdet', 'ResNet', RESNET),
    ('mmseg', 'ResNet', RESNET),
    ('mmseg', 'ResNetV1c', RESNET),
    ('mmdet', 'ResNetV1d', RESNET),
    (
        'mmdet',
        'ResNeXt',
        dict(
            depth=50,
            groups=4,
            base_width=4,
            base_channels=8,
            stem_channels=64,
        ),
    ),
    ('mmdet', 'MobileNetV2', dict(widen_factor=0.25)),
    ('mmseg', 'MobileNetV2', dict(widen_factor=0.25)),
    ('mmdet', 'HRNet', dict(extra=HRNET_W18)),
    ('mmseg', 'HRNet', dict(extra=HRNET_W18)),
    (
        'mmdet',
        'SwinTransformer',
        WINDOWS
        | dict(window_size=2, pretrain_img_size=SIDE, out_indices=(3,)),
    ),
]


def densecl(name, settings):
    backbone = dict(type=f'mmpretrain.{name}', **settings)
    with torch.no_grad():
        last = last_map(MODELS.build(backbone)(torch.zeros(2, 3, SIDE, SIDE)))
    assert last.dim() == 4
    model = MODELS.build(
        dict(
            type='mmdensecl.DenseCL',
            backbone=backbone,
            neck=dict(
                type='mmdensecl.DenseCLNeck',
                in_channels=last.size(1),
                hid_channels=8,
                out_channels=4,
            ),
            queue_len=8,
            feat_dim=4,
        )
    )
    model.init_weights()
    return model.train(), backbone


def step(model):
    """Losses of one step, and the gradients."""
    views = [[0, 0, SIDE, SIDE, 0]] * 2
    losses = model(
        [torch.randn(4, 3, SIDE, SIDE) for _ in range(2)],
        [DataSample(metainfo=dict(views=views)) for _ in range(4)],
        mode='loss',
    )
    loss = sum(x for k, x in losses.items() if 'loss' in k)
    loss.backward()
    assert loss.isfinite()


def publish(model, folder):
    path, out = folder / 'epoch_1.pth', folder / 'published.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    out.write_bytes(encode_backbone(read_backbone(path), 'openmmlab'))
    return str(out)


def equal_states(a, b):
    return [*a] == [*b] and all(map(torch.equal, a.values(), b.values()))


def test_the_list_is_complete():
    """What another version of mmpretrain brings is looked at."""
    known = {*MAPS, *SLOW} | OTHERS
    assert {*installed.__all__} <= known


@pytest.mark.parametrize(
    'name',
    [*MAPS, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW)],
)
def test_the_whole_way(name, tmp_path):
    if not hasattr(installed, name):
        pytest.skip(f'this mmpretrain has no {name}')
    if name == 'TIMMBackbone':
        pytest.importorskip('timm')
    model, cfg = densecl(name, {**MAPS, **SLOW}[name])
    step(model)
    path = publish(model, tmp_path)
    fresh = MODELS.build(cfg)
    PretrainedBackbone(path)(fresh)
    trained = model.backbone.state_dict()
    assert equal_states(fresh.state_dict(), trained)
    if name == 'TIMMBackbone':  # its names are left out
        return
    found = load_backbone(path, backbone=cfg)
    assert equal_states(found.backbone.state_dict(), trained)
    assert found.extract_dense(torch.zeros(3, SIDE, SIDE)).dim() == 3


@pytest.mark.parametrize('host, name, settings', TWINS)
def test_twins(host, name, settings, tmp_path):
    pytest.importorskip(host)
    source = densecl(name, MAPS[name])[0]
    twin = HOST_MODELS.build(dict(type=f'{host}.{name}', **settings))
    PretrainedBackbone(publish(source, tmp_path))(twin)
    given = source.backbone.state_dict()
    own = twin.state_dict()
    for key, x in own.items():
        there = key if key in given else name_in_twin(key, own)
        assert torch.equal(x, given[there]), key
    back = MODELS.build(dict(type=f'mmpretrain.{name}', **MAPS[name]))
    if 'ResNetV' in name:  # and the other way round
        file = tmp_path / 'twin.pth'
        torch.save(dict(state_dict=own), file)
        PretrainedBackbone(str(file))(back)
        assert equal_states(back.state_dict(), given)
