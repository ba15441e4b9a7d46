_base_ = '../mini/faster-rcnn_r18-fpn_voc.py'
# The scenes of tools/demo/make_scenes.py, shorter still.
max_iters = 80

train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10),
    dict(
        type='MultiStepLR',
        by_epoch=False,
        milestones=[max_iters * 3 // 4, max_iters * 11 // 12],
        gamma=0.1)
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 4))
