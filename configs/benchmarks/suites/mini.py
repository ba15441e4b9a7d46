# Small transfer tasks, minutes a run on a CPU core, for the quarter-width
# ResNet-18 of configs/mini. They compare rows with each other; their numbers
# are no published protocol's. There is no detection: trained for minutes,
# detectors measured next to nothing (docs/benchmarks.md).
name = 'mini'
title = 'Small transfer benchmark'
description = (
    'FCN on a ResNet-18 of a quarter of the width, small images and short '
    'schedules. It compares the rows with each other and with nothing else.'
)

miou = [
    dict(key='mIoU', name='mIoU', scale=1.0, unit='%'),
    dict(key='aAcc', name='pixel accuracy', scale=1.0, unit='%'),
]
common = dict(model='FCN R18-d16, quarter width', metrics=miou)

tasks = [
    dict(
        common,
        name='street',
        title='Street scenes (Cityscapes)',
        layout='cityscapes',
        data='cityscapes',
        configs=dict(
            frozen='../mini/fcn_r18w16-d16_cityscapes_frozen.py',
            finetune='../mini/fcn_r18w16-d16_cityscapes.py',
        ),
    ),
    dict(
        common,
        name='fashion',
        title='Clothes on photographs',
        layout='voc_seg',
        data='fashion',
        configs=dict(
            frozen='../mini/fcn_r18w16-d16_fashion_frozen.py',
            finetune='../mini/fcn_r18w16-d16_fashion.py',
        ),
    ),
    dict(
        common,
        name='voc_seg',
        title='VOC segmentation',
        layout='voc_seg',
        data='VOCdevkit/VOC2012',
        configs=dict(
            frozen='../mini/fcn_r18w16-d16_voc_frozen.py',
            finetune='../mini/fcn_r18w16-d16_voc.py',
        ),
    ),
]
