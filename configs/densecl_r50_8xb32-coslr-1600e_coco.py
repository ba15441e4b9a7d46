_base_ = './densecl_r50_8xb32-coslr-800e_coco.py'

train_cfg = dict(max_epochs=1600)
