_base_ = [
    '../_base_/models/fcn_r50-d8.py',
    'mmseg::_base_/datasets/pascal_voc12_aug.py',
    '../_base_/schedules/mmseg_20k.py',
]
# Source: DenseCL's VOC protocol, mmseg's
# fcn_r50-d8_4xb4-20k_voc12aug-512x512.py with a plain ResNet.

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=21),
    auxiliary_head=dict(num_classes=21),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
