_base_ = './fcn_r18w16-d16_voc.py'
# Street scenes in the layout of Cityscapes, train -> val.
data_root = 'data/cityscapes/'

model = dict(
    decode_head=dict(num_classes=19), auxiliary_head=dict(num_classes=19)
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CityscapesDataset',
        data_root=data_root,
        data_prefix=dict(
            img_path='leftImg8bit/train', seg_map_path='gtFine/train'
        ),
        pipeline=_base_.train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CityscapesDataset',
        data_root=data_root,
        data_prefix=dict(
            img_path='leftImg8bit/val', seg_map_path='gtFine/val'
        ),
        pipeline=_base_.test_pipeline,
    )
)
test_dataloader = val_dataloader
