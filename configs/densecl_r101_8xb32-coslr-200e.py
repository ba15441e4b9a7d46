_base_ = './densecl_r50_8xb32-coslr-200e.py'

model = dict(backbone=dict(depth=101))
