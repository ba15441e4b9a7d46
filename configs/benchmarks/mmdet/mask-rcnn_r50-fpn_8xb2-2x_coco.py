_base_ = [
    '../_base_/models/mask-rcnn_r50-fpn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/mmdet_180k.py',
]
# Source: as 1x, with detectron2's 2x.
