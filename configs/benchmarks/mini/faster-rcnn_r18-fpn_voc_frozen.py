_base_ = './faster-rcnn_r18-fpn_voc.py'

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
