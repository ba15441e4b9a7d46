# Two MoCo-v2 views of each picture below data_root.
data_root = 'data/imagenet/train'

train_pipeline = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(
        type='mmdensecl.TwoViews',
        size=224,
        crop_scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_prob=0.8,
        gray_prob=0.2,
        blur_sigma=(0.1, 2.0),
        blur_prob=0.5,
        flip_prob=0.5,
    ),
    dict(type='mmdensecl.PackViews'),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='mmdensecl.UnlabeledFolder',
        data_root=data_root,
        pipeline=train_pipeline,
    ),
)
