_base_ = '../mini/fcn_r18-d16_voc.py'
# The scenes of tools/demo/make_scenes.py, shorter still.
max_iters = 80

param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-4,
        power=0.9,
        begin=0,
        end=max_iters,
        by_epoch=False)
]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters // 4))
