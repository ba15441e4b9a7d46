# What tools/demo.sh ends with: two tasks of `mini`, cut to a minute a run, on
# the scenes that tools/demo/make_scenes.py composes.
name = 'demo'
title = 'Demo: transfer to composed scenes'
description = ('Objects cut from seven photographs on grounds of seven '
               'others; the class of an object is its photograph. Trained '
               'and scored on different regions of them.')

max_iters = 80
length = {
    'train_cfg.max_iters': max_iters,
    'train_cfg.val_interval': max_iters,
    'default_hooks.checkpoint.interval': max_iters // 4,
}

tasks = [
    dict(
        name='segmentation',
        title='Scene segmentation',
        model='FCN R18-d16',
        layout='voc_seg',
        data='VOCdevkit/VOC2012',
        seconds=dict(frozen=45, finetune=75),
        configs=dict(
            frozen='../mini/fcn_r18-d16_voc_frozen.py',
            finetune='../mini/fcn_r18-d16_voc.py'),
        options={
            **length, 'param_scheduler.0.end': max_iters
        },
        metrics=[
            dict(key='mIoU', name='mIoU', scale=1., unit='%'),
            dict(key='aAcc', name='pixel accuracy', scale=1., unit='%'),
        ]),
    dict(
        name='detection',
        title='Scene detection',
        model='Faster R-CNN R18-FPN',
        layout='voc',
        data='VOCdevkit',
        seconds=dict(frozen=55, finetune=75),
        configs=dict(
            frozen='../mini/faster-rcnn_r18-fpn_voc_frozen.py',
            finetune='../mini/faster-rcnn_r18-fpn_voc.py'),
        options={
            **length, 'param_scheduler.0.end':
            10,
            'param_scheduler.1.milestones':
            [max_iters * 3 // 4, max_iters * 11 // 12]
        },
        metrics=[
            dict(key='pascal_voc/AP50', name='AP50', scale=100., unit='%'),
            dict(key='pascal_voc/mAP', name='AP', scale=100., unit='%'),
        ]),
]
