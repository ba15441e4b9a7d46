_base_ = './mmdet_90k.py'
# Source: detection/configs/pascal_voc_R_50_C4_24k.yaml of
# facebookresearch/moco, which DenseCL uses.

train_cfg = dict(max_iters=24000, val_interval=4000)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100
    ),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        milestones=[18000, 22000],
        gamma=0.1,
    ),
]
default_hooks = dict(checkpoint=dict(interval=4000))
