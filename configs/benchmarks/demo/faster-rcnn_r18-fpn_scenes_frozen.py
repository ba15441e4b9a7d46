_base_ = './faster-rcnn_r18-fpn_scenes.py'

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
