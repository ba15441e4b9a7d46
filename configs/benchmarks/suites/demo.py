_base_ = './mini.py'
# What tools/demo.sh ends with: a linear segmentation of frozen features on the
# scenes that tools/demo/make_scenes.py composes, half a minute a run.
name = 'demo'
title = 'Demo: segmentation of composed gardens'
description = (
    'Lawn, gravel, brick, bushes, flowers, pages and coins, cut from '
    'photographs. Trained and scored on different regions of them.'
)

tasks = [
    dict(
        name='gardens',
        title='Gardens',
        model='linear, R18-d16 of a quarter of the width',
        layout='voc_seg',
        data='VOCdevkit/VOC2012',
        configs=dict(frozen='../../demo/linear_r18w16-d16_scenes.py'),
        metrics=_base_.miou,
    )
]
