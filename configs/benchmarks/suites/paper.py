# The protocols of the literature in full, see configs/benchmarks/README.md.
# Days on 8 GPUs: look first at `tools/benchmark.py run paper --dry-run`.
name = 'paper'
title = 'DenseCL transfer protocols'
description = (
    'The transfer protocols of Wang et al. (CVPR 2021) and of its '
    'journal version, with ResNet-50.'
)
published = 'published.yml'

coco = [
    dict(key='coco/bbox_mAP', name='box AP', scale=100.0, unit='%'),
    dict(key='coco/segm_mAP', name='mask AP', scale=100.0, unit='%'),
    dict(key='coco/bbox_mAP_50', name='box AP50', scale=100.0, unit='%'),
    dict(key='coco/segm_mAP_50', name='mask AP50', scale=100.0, unit='%'),
]
voc = [
    dict(key='pascal_voc/mAP', name='AP', scale=100.0, unit='%'),
    dict(key='pascal_voc/AP50', name='AP50', scale=100.0, unit='%'),
    dict(key='pascal_voc/AP75', name='AP75', scale=100.0, unit='%'),
]
miou = [dict(key='mIoU', name='mIoU', scale=1.0, unit='%')]

tasks = [
    dict(
        name='voc_det_c4',
        title='VOC07+12 detection',
        model='Faster R-CNN R50-C4, 24k',
        layout='voc0712',
        data='VOCdevkit',
        configs=dict(
            frozen='../mmdet/faster-rcnn_r50-c4_8xb2-24k_voc0712_frozen.py',
            finetune='../mmdet/faster-rcnn_r50-c4_8xb2-24k_voc0712.py',
        ),
        metrics=voc,
    ),
    dict(
        name='voc_det_fpn',
        title='VOC07+12 detection',
        model='Faster R-CNN R50-FPN, 24k',
        layout='voc0712',
        data='VOCdevkit',
        configs=dict(
            frozen='../mmdet/faster-rcnn_r50-fpn_8xb2-24k_voc0712_frozen.py',
            finetune='../mmdet/faster-rcnn_r50-fpn_8xb2-24k_voc0712.py',
        ),
        metrics=voc,
    ),
    dict(
        name='coco_fpn_1x',
        title='COCO detection and instance segmentation',
        model='Mask R-CNN R50-FPN, 1x',
        layout='coco',
        data='coco',
        configs=dict(
            frozen='../mmdet/mask-rcnn_r50-fpn_8xb2-1x_coco_frozen.py',
            finetune='../mmdet/mask-rcnn_r50-fpn_8xb2-1x_coco.py',
        ),
        metrics=coco,
    ),
    dict(
        name='coco_fpn_2x',
        title='COCO detection and instance segmentation',
        model='Mask R-CNN R50-FPN, 2x',
        layout='coco',
        data='coco',
        configs=dict(
            frozen='../mmdet/mask-rcnn_r50-fpn_8xb2-2x_coco_frozen.py',
            finetune='../mmdet/mask-rcnn_r50-fpn_8xb2-2x_coco.py',
        ),
        metrics=coco,
    ),
    dict(
        name='coco_c4_1x',
        title='COCO detection and instance segmentation',
        model='Mask R-CNN R50-C4, 1x',
        layout='coco',
        data='coco',
        configs=dict(
            frozen='../mmdet/mask-rcnn_r50-c4_8xb2-1x_coco_frozen.py',
            finetune='../mmdet/mask-rcnn_r50-c4_8xb2-1x_coco.py',
        ),
        metrics=coco,
    ),
    dict(
        name='coco_c4_2x',
        title='COCO detection and instance segmentation',
        model='Mask R-CNN R50-C4, 2x',
        layout='coco',
        data='coco',
        configs=dict(
            frozen='../mmdet/mask-rcnn_r50-c4_8xb2-2x_coco_frozen.py',
            finetune='../mmdet/mask-rcnn_r50-c4_8xb2-2x_coco.py',
        ),
        metrics=coco,
    ),
    dict(
        name='coco_10pct',
        title='COCO, 10% of the labels',
        model='Mask R-CNN R50-FPN, 90k',
        layout='coco',
        data='coco',
        configs=dict(
            frozen='../mmdet/mask-rcnn_r50-fpn_8xb2-90k_coco-10pct_frozen.py',
            finetune='../mmdet/mask-rcnn_r50-fpn_8xb2-90k_coco-10pct.py',
        ),
        metrics=coco,
    ),
    dict(
        name='voc_seg',
        title='VOC12 + aug segmentation',
        model='FCN R50-d8, 20k',
        layout='voc_seg',
        data='VOCdevkit/VOC2012',
        configs=dict(
            frozen='../mmseg/fcn_r50-d8_4xb4-20k_voc12aug-512x512_frozen.py',
            finetune='../mmseg/fcn_r50-d8_4xb4-20k_voc12aug-512x512.py',
        ),
        metrics=miou,
    ),
    dict(
        name='cityscapes_769',
        title='Cityscapes segmentation',
        model='FCN R50-d8, 40k, 769 px',
        layout='cityscapes',
        data='cityscapes',
        configs=dict(
            frozen='../mmseg/fcn_r50-d8_4xb2-40k_cityscapes-769x769_frozen.py',
            finetune='../mmseg/fcn_r50-d8_4xb2-40k_cityscapes-769x769.py',
        ),
        metrics=miou,
    ),
    dict(
        name='cityscapes_512',
        title='Cityscapes segmentation',
        model='FCN R50-d8, 40k, 512 x 1024 px',
        layout='cityscapes',
        data='cityscapes',
        configs=dict(
            frozen='../mmseg/'
            'fcn_r50-d8_4xb2-40k_cityscapes-512x1024_frozen.py',
            finetune='../mmseg/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        ),
        metrics=miou,
    ),
    dict(
        name='imagenet_linear',
        title='ImageNet linear classification',
        model='linear R50, 100 epochs',
        layout='imagenet',
        data='imagenet',
        configs=dict(
            frozen='../mmpretrain/resnet50_8xb32-steplr-100e_in1k_linear.py'
        ),
        metrics=[
            dict(key='accuracy/top1', name='top-1', scale=1.0, unit='%'),
        ],
    ),
    dict(
        name='imagenet_knn',
        title='ImageNet nearest neighbours',
        model='kNN R50, k = 20',
        layout='imagenet',
        data='imagenet',
        configs=dict(frozen='../mmpretrain/resnet50_knn_in1k.py'),
        metrics=[
            dict(key='knn_20/top1', name='top-1', scale=1.0, unit='%'),
        ],
    ),
    dict(
        name='voc07_svm',
        title='VOC07 classification',
        model='linear SVM R50',
        layout='voc0712',
        data='VOCdevkit',
        configs=dict(frozen='../mmpretrain/resnet50_svm_voc07.py'),
        metrics=[dict(key='svm/mAP', name='mAP', scale=1.0, unit='%')],
    ),
    dict(
        name='voc07_low_shot',
        title='VOC07 low-shot classification',
        model='linear SVM R50',
        layout='voc0712',
        data='VOCdevkit',
        configs=dict(frozen='../mmpretrain/resnet50_low-shot_voc07.py'),
        metrics=[
            dict(
                key=f'low_shot/k{k}_mAP', name=f'k = {k}', scale=1.0, unit='%'
            )
            for k in (16, 1, 4, 96)
        ],
    ),
]
