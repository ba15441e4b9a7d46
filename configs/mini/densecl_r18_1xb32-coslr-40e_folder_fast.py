_base_ = './densecl_r18_1xb32-coslr-40e_folder.py'

# What densecl_r50_8xb32-coslr-200e_fast.py switches on.
model = dict(
    channels_last=True,
    compile_encoders=True,
    data_preprocessor=dict(type='mmdensecl.DeviceViews', size=96))
optim_wrapper = dict(type='mmdensecl.BFloat16OptimWrapper')
train_pipeline = [
    dict(type='mmdensecl.DecodeRGB'),
    dict(type='mmdensecl.DrawViews'),
    dict(type='mmdensecl.PackPicture'),
]
train_dataloader = dict(
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(pipeline=train_pipeline))
