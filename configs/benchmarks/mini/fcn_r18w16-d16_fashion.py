_base_ = './fcn_r18w16-d16_voc.py'
# Clothes on street photographs, in the layout of VOC2012: eight classes and
# background, train -> val. PascalVOCDataset insists on VOC's classes.
data_root = 'data/fashion'

classes = (
    'background',
    'skin',
    'hair',
    'footwear',
    'bag',
    'lower',
    'dress',
    'accessory',
    'upper',
)
metainfo = dict(
    classes=classes,
    palette=[
        [0, 0, 0],
        [255, 205, 148],
        [101, 67, 33],
        [128, 0, 0],
        [255, 165, 0],
        [0, 0, 255],
        [255, 0, 255],
        [255, 255, 0],
        [0, 128, 0],
    ],
)
model = dict(
    decode_head=dict(num_classes=len(classes)),
    auxiliary_head=dict(num_classes=len(classes)),
)
dataset = dict(type='BaseSegDataset', data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dataset)
val_dataloader = dict(dataset=dataset)
test_dataloader = val_dataloader
