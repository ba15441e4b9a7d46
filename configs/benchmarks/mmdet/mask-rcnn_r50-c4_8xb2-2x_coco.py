_base_ = [
    '../_base_/models/mask-rcnn_r50-c4.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/schedules/mmdet_180k.py',
]
# Source: detection/configs/coco_R_50_C4_2x_moco.yaml of facebookresearch/moco.
