_base_ = '../densecl_r50_8xb32-coslr-200e_folder.py'
# A ResNet-18 on small pictures: about three minutes on two CPU cores.
max_epochs = 20
data_root = 'data/demo_tiles'

model = dict(
    momentum=0.01,  # few steps: the key encoder must follow faster
    backbone=dict(depth=18, strides=(1, 2, 2, 1)),  # 6 x 6 cells at 96 px
    neck=dict(in_channels=512, hid_channels=512),
)

train_pipeline = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=96),
    dict(type='mmdensecl.PackViews'),
]
train_dataloader = dict(
    num_workers=2,
    pin_memory=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)

optim_wrapper = dict(optimizer=dict(lr=0.06))
param_scheduler = dict(T_max=max_epochs)
train_cfg = dict(max_epochs=max_epochs)
auto_scale_lr = dict(base_batch_size=32)
default_hooks = dict(
    logger=dict(interval=6), checkpoint=dict(interval=1, max_keep_ckpts=2)
)
