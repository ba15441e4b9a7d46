_base_ = [
    './_base_/models/mocov2_r50.py',
    './_base_/datasets/two_views.py',
    './_base_/schedules/sgd_coslr_200e.py',
    './_base_/default_runtime.py',
]

# MoCo-v2 plus the dense branch.
model = dict(
    type='mmdensecl.DenseCL',
    loss_lambda=0.5,
    correspondence=dict(type='mmdensecl.BackboneSimilarity'),
    neck=dict(
        _delete_=True,
        type='mmdensecl.DenseCLNeck',
        in_channels=2048,
        hid_channels=2048,
        out_channels=128,
        num_grid=None,
    ),
)
