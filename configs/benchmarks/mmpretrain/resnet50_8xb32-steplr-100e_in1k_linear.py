_base_ = (
    'mmpretrain::mocov2/benchmarks/resnet50_8xb32-linear-steplr-100e_in1k.py'  # noqa: E501
)
# Linear evaluation on ImageNet as in MoCo: a linear layer on the frozen
# features, lr 30, no weight decay, 100 epochs. All that is inherited; added
# here are our initialiser, batch norms that stay as they are, and data_root.
data_root = 'data/imagenet'

model = dict(
    backbone=dict(
        frozen_stages=4,
        norm_eval=True,
        init_cfg=dict(
            _delete_=True, type='mmdensecl.PretrainedBackbone', checkpoint=None
        ),
    )
)

train_dataloader = dict(
    persistent_workers=True, dataset=dict(data_root=data_root)
)
val_dataloader = dict(
    persistent_workers=True, dataset=dict(data_root=data_root)
)
test_dataloader = val_dataloader

env_cfg = dict(cudnn_benchmark=True)
auto_scale_lr = dict(base_batch_size=256)
