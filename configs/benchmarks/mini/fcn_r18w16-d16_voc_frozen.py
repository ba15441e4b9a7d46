_base_ = './fcn_r18w16-d16_voc.py'

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
