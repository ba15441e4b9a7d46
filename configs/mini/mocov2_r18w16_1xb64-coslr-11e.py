_base_ = [
    '../_base_/models/mocov2_r50.py',
    '../_base_/datasets/two_views.py',
    '../_base_/schedules/sgd_coslr_200e.py',
    '../_base_/default_runtime.py',
]
# MoCo-v2 at a size that one CPU core trains on 250,000 samples in about 10
# minutes: a ResNet-18 of a quarter of the width, views of 64 pixels.
data_root = 'data/my_images'

model = dict(
    queue_len=4096,
    momentum=0.01,  # few steps: the key encoder must follow faster
    virtual_ranks='auto',  # two groups of 32 images
    backbone=dict(
        depth=18, stem_channels=16, base_channels=16, strides=(1, 2, 2, 1)
    ),  # 4 x 4 cells at 64 pixels
    neck=dict(in_channels=128, hid_channels=256),
)

train_pipeline = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.TwoViews', size=64),
    dict(type='mmdensecl.PackViews'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=1,
    pin_memory=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)

# bfloat16 where the processor multiplies it in hardware.
optim_wrapper = dict(
    type='mmdensecl.BFloat16OptimWrapper',
    enabled='auto',
    optimizer=dict(lr=0.06),
)
train_cfg = dict(max_epochs=11)  # of 23,397 images
auto_scale_lr = dict(base_batch_size=64)
default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(interval=1, max_keep_ckpts=1)
)
