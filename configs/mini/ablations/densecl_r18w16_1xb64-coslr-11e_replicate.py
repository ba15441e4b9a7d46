_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(
    backbone=dict(conv_cfg=dict(type='Conv2d', padding_mode='replicate'))
)
