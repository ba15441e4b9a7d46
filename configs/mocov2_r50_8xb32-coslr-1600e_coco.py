_base_ = './mocov2_r50_8xb32-coslr-800e_coco.py'

max_epochs = 1600

param_scheduler = dict(T_max=max_epochs)
train_cfg = dict(max_epochs=max_epochs)
