_base_ = '../demo/densecl_r18_1xb32-coslr-20e_tiles.py'
# For the benchmark's suite `mini`: a folder of a few thousand pictures.
max_epochs = 40
data_root = 'data/my_pictures'

train_dataloader = dict(dataset=dict(data_root=data_root))
param_scheduler = dict(T_max=max_epochs)
train_cfg = dict(max_epochs=max_epochs)
default_hooks = dict(
    logger=dict(interval=20), checkpoint=dict(interval=5, max_keep_ckpts=2))
