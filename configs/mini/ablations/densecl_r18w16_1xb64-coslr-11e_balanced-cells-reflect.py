_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(
    correspondence=dict(_delete_=True, type='mmdensecl.BalancedSimilarity'),
    dense_negatives='cells',
    backbone=dict(conv_cfg=dict(type='Conv2d', padding_mode='reflect')),
)
