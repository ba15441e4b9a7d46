_base_ = [
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]
# detectron2's 1x: 90k iterations of 16 pictures, and its warm-up of 1000.
# The optimizer and auto_scale_lr (8 x 2 pictures) are mmdet's.

train_cfg = dict(
    _delete_=True,
    type='IterBasedTrainLoop',
    max_iters=90000,
    val_interval=15000,
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000
    ),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        milestones=[60000, 80000],
        gamma=0.1,
    ),
]

default_hooks = dict(
    checkpoint=dict(
        type='mmdensecl.SafeCheckpointHook',
        by_epoch=False,
        interval=15000,
        max_keep_ckpts=2,
    )
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
