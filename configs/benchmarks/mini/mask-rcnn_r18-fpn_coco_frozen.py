_base_ = './mask-rcnn_r18-fpn_coco.py'

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
