_base_ = [
    './densecl_r18_1xb32-coslr-40e_folder.py',
    '../_base_/datasets/device_views.py',
]

# What densecl_r50_8xb32-coslr-200e_fast.py switches on.
model = dict(
    channels_last=True,
    compile_encoders=True,
    data_preprocessor=dict(type='mmdensecl.DeviceViews', size=96))
optim_wrapper = dict(type='mmdensecl.BFloat16OptimWrapper')
train_dataloader = {{_base_.device_views}}
