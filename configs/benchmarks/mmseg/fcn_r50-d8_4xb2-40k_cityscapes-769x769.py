_base_ = [
    '../_base_/models/fcn_r50-d8.py',
    'mmseg::_base_/datasets/cityscapes_769x769.py',
    '../_base_/schedules/mmseg_40k.py',
]
# Source: DenseCL's Cityscapes protocol, mmseg's
# fcn_r50-d8_4xb2-40k_cityscapes-769x769.py with a plain ResNet.

model = dict(
    data_preprocessor=dict(size=(769, 769)),
    decode_head=dict(align_corners=True),
    auxiliary_head=dict(align_corners=True),
    test_cfg=dict(mode='slide', crop_size=(769, 769), stride=(513, 513)),
)
auto_scale_lr = dict(enable=False, base_batch_size=8)
