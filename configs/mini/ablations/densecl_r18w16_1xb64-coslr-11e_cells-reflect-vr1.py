_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(
    virtual_ranks=1,
    dense_negatives='cells',
    backbone=dict(conv_cfg=dict(type='Conv2d', padding_mode='reflect')),
)
