_base_ = '../benchmarks/mini/fcn_r18w16-d16_voc_frozen.py'
# A linear segmentation of frozen features, on the scenes of
# tools/demo/make_scenes.py: about 20 seconds on a CPU core.
max_iters = 100
crop_size = (256, 256)

model = dict(
    data_preprocessor=dict(size=crop_size),
    # Two 1 x 1 convolutions with a batch norm between them, which brings all
    # features to one scale, and nothing else: together they are linear.
    decode_head=dict(
        channels=128,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        dropout_ratio=0,
        act_cfg=None,
    ),
    auxiliary_head=None,
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

param_scheduler = [dict(_base_.param_scheduler[0], end=max_iters)]
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
default_hooks = dict(checkpoint=dict(interval=max_iters // 4))
