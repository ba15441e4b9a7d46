_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(
    correspondence=dict(type='mmdensecl.BackboneSimilarity', weight_power=2.0)
)
