_base_ = [
    '../_base_/models/mask-rcnn_r50-c4.py',
    '../_base_/datasets/voc0712.py',
    '../_base_/schedules/mmdet_24k.py',
]
# Source: DenseCL, benchmarks/detection of WXinlong/DenseCL, which runs
# pascal_voc_R_50_C4_24k_moco.yaml of facebookresearch/moco (detectron2).

# Boxes only.
model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(bbox_head=dict(num_classes=20), mask_head=None),
)
