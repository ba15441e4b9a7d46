_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(virtual_ranks=1)
