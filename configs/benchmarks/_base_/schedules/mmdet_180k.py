_base_ = './mmdet_90k.py'
# detectron2's 2x.

train_cfg = dict(max_iters=180000, val_interval=30000)
param_scheduler = [
    _base_.param_scheduler[0],
    dict(
        type='MultiStepLR',
        by_epoch=False,
        milestones=[120000, 160000],
        gamma=0.1,
    ),
]
default_hooks = dict(checkpoint=dict(interval=30000))
