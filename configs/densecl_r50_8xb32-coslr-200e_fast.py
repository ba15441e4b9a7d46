_base_ = [
    './densecl_r50_8xb32-coslr-200e_amp.py',
    './_base_/datasets/device_views.py',
]

# The published recipe at full speed, for GPUs: bfloat16, channels last,
# compiled encoders, views rendered on the device. What is drawn for a picture
# is what the published config draws; only rounding differs.
model = dict(
    channels_last=True,
    compile_encoders=True,
    data_preprocessor=dict(type='mmdensecl.DeviceViews', size=224),
)
train_dataloader = {{_base_.device_views}}
