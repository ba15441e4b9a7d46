model = dict(
    type='mmdensecl.MoCoV2',
    queue_len=65536,
    feat_dim=128,
    momentum=0.001,  # of the query, m = 0.999 in the papers
    data_preprocessor=dict(
        # ImageNet statistics in 0-255, RGB as the pipeline decodes.
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        non_blocking=True,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        norm_cfg=dict(type='BN'),
        zero_init_residual=False,
        # The authors' initialisation; mmpretrain's own is fan-out.
        init_cfg=[
            dict(type='Kaiming', layer='Conv2d', mode='fan_in'),
            dict(type='Constant', layer=['_BatchNorm', 'GroupNorm'], val=1),
        ],
    ),
    neck=dict(
        type='MoCoV2Neck',
        in_channels=2048,
        hid_channels=2048,
        out_channels=128,
        init_cfg=dict(type='Kaiming', layer='Linear', mode='fan_in'),
    ),
    head=dict(
        type='mmdensecl.ContrastiveHead',
        loss=dict(type='mmdensecl.InfoNCE', temperature=0.2),
    ),
)
