_base_ = './mocov2_r50_8xb32-coslr-200e.py'

data_root = 'data/coco'

train_dataloader = dict(dataset=dict(data_root=f'{data_root}/train2017'))

# Ten times ImageNet's, as published.
optim_wrapper = dict(optimizer=dict(lr=0.3))
train_cfg = dict(max_epochs=800)
