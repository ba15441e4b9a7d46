_base_ = [
    '../_base_/models/mask-rcnn_r50-fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/mmdet_90k.py',
]
# Source: DenseCL's COCO protocol, detectron2's R50-FPN 1x with SyncBN
# everywhere and nothing frozen.
