# The models and losses of `paper` at small size: minutes a run on a CPU core,
# on any data in the layouts of COCO, VOC and Cityscapes. It compares rows with
# each other; its numbers are no published protocol's.
# `seconds` are rough ones of a core of a small machine.
name = 'mini'
title = 'Small transfer benchmark'
description = (
    'ResNet-18 on small pictures with short schedules. It compares '
    'the rows with each other and with nothing else.'
)

miou = [
    dict(key='mIoU', name='mIoU', scale=1.0, unit='%'),
    dict(key='aAcc', name='pixel accuracy', scale=1.0, unit='%'),
]

tasks = [
    dict(
        name='voc_det',
        title='VOC detection',
        model='Faster R-CNN R18-FPN',
        layout='voc',
        data='VOCdevkit',
        seconds=dict(frozen=150, finetune=250),
        configs=dict(
            frozen='../mini/faster-rcnn_r18-fpn_voc_frozen.py',
            finetune='../mini/faster-rcnn_r18-fpn_voc.py',
        ),
        metrics=[
            dict(key='pascal_voc/AP50', name='AP50', scale=100.0, unit='%'),
            dict(key='pascal_voc/mAP', name='AP', scale=100.0, unit='%'),
        ],
    ),
    dict(
        name='coco_inst',
        title='COCO detection and segmentation',
        model='Mask R-CNN R18-FPN',
        layout='coco',
        data='coco',
        seconds=dict(frozen=240, finetune=360),
        configs=dict(
            frozen='../mini/mask-rcnn_r18-fpn_coco_frozen.py',
            finetune='../mini/mask-rcnn_r18-fpn_coco.py',
        ),
        metrics=[
            dict(
                key='coco/bbox_mAP_50', name='box AP50', scale=100.0, unit='%'
            ),
            dict(
                key='coco/segm_mAP_50', name='mask AP50', scale=100.0, unit='%'
            ),
            dict(key='coco/bbox_mAP', name='box AP', scale=100.0, unit='%'),
            dict(key='coco/segm_mAP', name='mask AP', scale=100.0, unit='%'),
            dict(key='coco/bbox_AR@100', name='box AR', scale=100.0, unit='%'),
        ],
    ),
    dict(
        name='voc_seg',
        title='VOC segmentation',
        model='FCN R18-d16',
        layout='voc_seg',
        data='VOCdevkit/VOC2012',
        seconds=dict(frozen=120, finetune=210),
        configs=dict(
            frozen='../mini/fcn_r18-d16_voc_frozen.py',
            finetune='../mini/fcn_r18-d16_voc.py',
        ),
        metrics=miou,
    ),
    dict(
        name='cityscapes',
        title='Cityscapes segmentation',
        model='FCN R18-d16',
        layout='cityscapes',
        data='cityscapes',
        seconds=dict(frozen=120, finetune=215),
        configs=dict(
            frozen='../mini/fcn_r18-d16_cityscapes_frozen.py',
            finetune='../mini/fcn_r18-d16_cityscapes.py',
        ),
        metrics=miou,
    ),
]
