_base_ = [
    '../_base_/models/fcn_r50-d8.py',
    'mmseg::_base_/datasets/cityscapes.py',
    '../_base_/schedules/mmseg_40k.py',
]
# Source: mmseg's fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py with a plain
# ResNet; cheaper than the 769 crop that DenseCL reports.

model = dict(data_preprocessor=dict(size=(512, 1024)))
auto_scale_lr = dict(enable=False, base_batch_size=8)
