# The 5,011 and 4,952 pictures of VOC 2007. Each is squeezed into 224 x 224 as
# a whole, and its 7 x 7 map pooled to 2 x 2, as mmselfsup does.
data_root = 'data/VOCdevkit'

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow'),
    dict(type='Resize', scale=(224, 224), backend='pillow'),
    # Difficult objects do not count.
    dict(type='PackInputs', meta_keys=('img_path', 'gt_label_difficult')),
]
test_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='VOC',
        data_root=f'{data_root}/VOC2007',
        split='test',
        pipeline=pipeline,
    ),
)
test_cfg = dict(
    pool=(6, 1),  # kernel, stride
    train_dataloader=dict(
        batch_size=64,
        num_workers=4,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
        dataset=dict(
            type='VOC',
            data_root=f'{data_root}/VOC2007',
            split='trainval',
            pipeline=pipeline,
        ),
    ),
)
