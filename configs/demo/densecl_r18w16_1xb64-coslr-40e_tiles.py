_base_ = '../mini/densecl_r18w16_1xb64-coslr-11e.py'
# DenseCL on the tiles of tools/demo/make_tiles.py: 87,000 samples, about three
# minutes on two CPU cores.
data_root = 'data/demo_tiles'

model = dict(queue_len='auto')
train_dataloader = dict(dataset=dict(data_root=data_root))
train_cfg = dict(max_epochs=40)  # of 2,230 tiles
default_hooks = dict(
    logger=dict(interval=34), checkpoint=dict(max_keep_ckpts=2)
)
