_base_ = './mini.py'
# What tools/demo.sh ends with: the segmentation of `mini`, cut to a minute a
# run, on the scenes that tools/demo/make_scenes.py composes.
name = 'demo'
title = 'Demo: segmentation of composed gardens'
description = ('Lawn, gravel, brick, bushes, flowers, pages and coins, cut '
               'from photographs. Trained and scored on different regions of '
               'them.')

max_iters = 200
scale = (192, 192)
crop_size = (160, 160)

tasks = [
    dict(
        _base_.tasks[2],
        name='segmentation',
        title='Garden segmentation',
        model='FCN R18-d16 of a quarter of the width',
        seconds=dict(frozen=45, finetune=75),
        options={
            'model.backbone.stem_channels': 16,
            'model.backbone.base_channels': 16,
            'model.decode_head.in_channels': 128,
            'model.auxiliary_head.in_channels': 64,
            'model.data_preprocessor.size': crop_size,
            'train_dataloader.dataset.pipeline.2.scale': scale,
            'train_dataloader.dataset.pipeline.3.crop_size': crop_size,
            'val_dataloader.dataset.pipeline.1.scale': scale,
            'test_dataloader.dataset.pipeline.1.scale': scale,
            'train_cfg.max_iters': max_iters,
            'train_cfg.val_interval': max_iters,
            'param_scheduler.0.end': max_iters,
            'default_hooks.checkpoint.interval': max_iters // 4,
        })
]
