# DSC-PM, our interpretation of the paper: docs/method.md.
# Beside a DenseCL config: model = {{_base_.dsc_pm}}
dsc_pm = dict(
    type='mmdensecl.DSC',
    # k is the class's, so that another rule needs no _delete_.
    correspondence=dict(type='mmdensecl.NearestNeighbors'),
    category=dict(
        type='mmdensecl.PrototypeCategoryHead',
        num_prototypes=64,
        feat_dim=128,
        epsilon=0.05,
        sinkhorn_iters=3,
        temperature=0.1,
    ),
    category_weight=0.5,
    num_samples=16,
)
