_base_ = '_base_/resnet50_features.py'
# Weighted kNN vote over the training set of ImageNet, accuracy on val.
data_root = 'data/imagenet'

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
test_dataloader = dict(
    batch_size=64,
    num_workers=5,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageNet', data_root=data_root, split='val', pipeline=pipeline
    ),
)
test_cfg = dict(
    type='mmdensecl.KNNLoop',
    ks=(10, 20, 100, 200),
    temperature=0.07,
    train_dataloader=dict(
        batch_size=64,
        num_workers=5,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='ImageNet',
            data_root=data_root,
            split='train',
            pipeline=pipeline,
        ),
    ),
)
