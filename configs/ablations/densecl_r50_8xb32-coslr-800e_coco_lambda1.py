_base_ = '../densecl_r50_8xb32-coslr-800e_coco.py'

model = dict(loss_lambda=1.0)

# Without any global loss the matches of a random backbone never improve.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type='mmdensecl.LambdaWarmupHook', start_iters=10000),
]
