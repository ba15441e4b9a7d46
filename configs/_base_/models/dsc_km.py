# DSC-KM, our interpretation of the paper: docs/dsc.md.
# Beside a DenseCL config: model = {{_base_.dsc_km}}
dsc_km = dict(
    type='mmdensecl.DSC',
    correspondence=dict(type='mmdensecl.NearestNeighbors', k=4),
    category=dict(
        type='mmdensecl.KMeansCategoryHead',
        num_clusters=64,
        num_iters=10,
        temperature=0.2),
    category_weight=0.5,
    num_samples=16)
