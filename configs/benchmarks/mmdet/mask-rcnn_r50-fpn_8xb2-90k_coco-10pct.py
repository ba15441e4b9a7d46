_base_ = './mask-rcnn_r50-fpn_8xb2-1x_coco.py'
# DenseCL's semi-supervised setting: labels for 10% of train2017 only. Neither
# its list nor its schedule is public (WXinlong/DenseCL#17 asks for them,
# unanswered). So the list is our own draw,
#   python tools/dataset_converters/coco_subset.py \
#       data/coco/annotations/instances_train2017.json --percent 10 --seed 0
# and the schedule stays 1x, a choice: 90k x 16 pictures is what the
# supervised baseline of Soft Teacher on the same share sees, 180k x 8. Expect
# other absolute numbers than the paper's; compare pre-trainings among
# themselves.

train_dataloader = dict(
    dataset=dict(ann_file='annotations/instances_train2017_10pct_seed0.json')
)
