_base_ = '../densecl_r18w16_1xb64-coslr-11e.py'
model = dict(loss_lambda=0.7)
