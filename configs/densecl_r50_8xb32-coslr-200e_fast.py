_base_ = './densecl_r50_8xb32-coslr-200e_amp.py'

# The published recipe at full speed, for GPUs: bfloat16, channels last,
# compiled encoders, views rendered on the device. What is drawn for a picture
# is what the published config draws; only rounding differs.
model = dict(
    channels_last=True,
    compile_encoders=True,
    data_preprocessor=dict(type='mmdensecl.DeviceViews', size=224))

# The workers read, decode and draw, with the published numbers.
train_pipeline = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.DrawViews'),
    dict(type='mmdensecl.PackPicture'),
]
train_dataloader = dict(
    # Pictures of different sizes cannot be stacked.
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(pipeline=train_pipeline))
