_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdensecl.LambdaWarmupHook', start_iters=1000),
]
