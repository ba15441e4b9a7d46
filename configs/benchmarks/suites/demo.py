_base_ = './mini.py'
# What tools/demo.sh ends with: a segmentation of a minute a run on the scenes
# that tools/demo/make_scenes.py composes.
name = 'demo'
title = 'Demo: segmentation of composed gardens'
description = (
    'Lawn, gravel, brick, bushes, flowers, pages and coins, cut '
    'from photographs. Trained and scored on different regions of them.'
)

max_iters = 200
size = (320, 320)
crop_size = (256, 256)

tasks = [
    dict(
        name='segmentation',
        title='Garden segmentation',
        model='FCN R18-d16 of a quarter of the width',
        layout='voc_seg',
        data='VOCdevkit/VOC2012',
        seconds=dict(frozen=40, finetune=70),
        configs=dict(
            frozen='../mini/fcn_r18w16-d16_voc_frozen.py',
            finetune='../mini/fcn_r18w16-d16_voc.py',
        ),
        metrics=_base_.miou,
        options={
            'model.data_preprocessor.size': crop_size,
            'train_dataloader.dataset.pipeline.2.scale': size,
            'train_dataloader.dataset.pipeline.3.crop_size': crop_size,
            'val_dataloader.dataset.pipeline.1.scale': size,
            'test_dataloader.dataset.pipeline.1.scale': size,
            'train_cfg.max_iters': max_iters,
            'train_cfg.val_interval': max_iters,
            'param_scheduler.0.end': max_iters,
            'default_hooks.checkpoint.interval': max_iters // 4,
        },
    )
]
