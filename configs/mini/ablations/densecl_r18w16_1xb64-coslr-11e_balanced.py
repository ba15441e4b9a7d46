_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(
    correspondence=dict(_delete_=True, type='mmdensecl.BalancedSimilarity')
)
