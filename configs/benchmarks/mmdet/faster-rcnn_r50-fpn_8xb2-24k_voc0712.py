_base_ = [
    '../_base_/models/mask-rcnn_r50-fpn.py',
    '../_base_/datasets/voc0712.py',
    '../_base_/schedules/mmdet_24k.py',
]
# Source: data and schedule of MoCo's R50-C4 24k; the detector is the FPN one
# that DenseCL trains on COCO, without the masks.

model = dict(
    type='FasterRCNN',
    data_preprocessor=dict(pad_mask=False),
    roi_head=dict(
        bbox_head=dict(num_classes=20), mask_roi_extractor=None, mask_head=None
    ),
)
