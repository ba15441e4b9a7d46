# DSC-KM, our interpretation of the paper: docs/method.md.
# Beside a DenseCL config: model = {{_base_.dsc_km}}
dsc_km = dict(
    type='mmdensecl.DSC',
    # k is the class's, so that another rule needs no _delete_.
    correspondence=dict(type='mmdensecl.NearestNeighbors'),
    category=dict(
        type='mmdensecl.KMeansCategoryHead',
        num_clusters=64,
        num_iters=10,
        temperature=0.2,
    ),
    category_weight=0.5,
    num_samples=16,
)
