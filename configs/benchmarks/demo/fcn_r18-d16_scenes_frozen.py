_base_ = './fcn_r18-d16_scenes.py'

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
