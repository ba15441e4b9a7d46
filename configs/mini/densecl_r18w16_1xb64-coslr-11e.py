_base_ = './mocov2_r18w16_1xb64-coslr-11e.py'
# DenseCL as published, at the same size.
model = dict(
    type='mmdensecl.DenseCL',
    loss_lambda=0.5,
    correspondence=dict(type='mmdensecl.BackboneSimilarity'),
    neck=dict(
        _delete_=True,
        type='mmdensecl.DenseCLNeck',
        in_channels=128,
        hid_channels=256,
        out_channels=128,
    ),
)
