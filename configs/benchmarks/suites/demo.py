_base_ = './mini.py'
# What tools/demo.sh ends with: two tasks of `mini`, cut to a minute a run, on
# the scenes that tools/demo/make_scenes.py composes.
name = 'demo'
title = 'Demo: transfer to composed scenes'
description = (
    'Objects cut from seven photographs on grounds of seven '
    'others; the class of an object is its photograph. Trained '
    'and scored on different regions of them.'
)

max_iters = 80
length = {
    'train_cfg.max_iters': max_iters,
    'train_cfg.val_interval': max_iters,
    'default_hooks.checkpoint.interval': max_iters // 4,
}

tasks = [
    dict(
        _base_.tasks[2],
        name='segmentation',
        title='Scene segmentation',
        seconds=dict(frozen=45, finetune=75),
        options={**length, 'param_scheduler.0.end': max_iters},
    ),
    dict(
        _base_.tasks[0],
        name='detection',
        title='Scene detection',
        seconds=dict(frozen=55, finetune=75),
        options={
            **length,
            'param_scheduler.0.end': 10,
            'param_scheduler.1.milestones': [
                max_iters * 3 // 4,
                max_iters * 11 // 12,
            ],
        },
    ),
]
