_base_ = '../densecl_r50_8xb32-coslr-800e_coco.py'

custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdensecl.LambdaWarmupHook', start_iters=10000),
]
