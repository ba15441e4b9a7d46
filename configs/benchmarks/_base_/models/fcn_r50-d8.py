_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'
# mmseg's own has a ResNetV1c, whose stem of three convolutions no pre-trained
# ResNet fills.

model = dict(
    pretrained=None,
    backbone=dict(
        type='ResNet',
        init_cfg=dict(type='mmdensecl.PretrainedBackbone', checkpoint=None),
    ),
)
