_base_ = './densecl_r18_1xb32-coslr-40e_folder.py'
# The baseline at equal cost: same pictures, views, steps and schedule.
model = dict(
    _delete_=True,
    type='mmdensecl.MoCoV2',
    queue_len='auto',
    feat_dim=128,
    momentum=0.01,
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        non_blocking=True),
    backbone=dict(
        type='ResNet',
        depth=18,
        strides=(1, 2, 2, 1),
        norm_cfg=dict(type='BN'),
        zero_init_residual=False,
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d', mode='fan_in'),
            dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1)
        ]),
    neck=dict(
        type='MoCoV2Neck',
        in_channels=512,
        hid_channels=512,
        out_channels=128,
        init_cfg=dict(type='Kaiming', layer='Linear', mode='fan_in')),
    head=dict(
        type='mmdensecl.ContrastiveHead',
        loss=dict(type='mmdensecl.InfoNCE', temperature=0.2)))
