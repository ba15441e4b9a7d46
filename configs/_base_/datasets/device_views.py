# Two views of each picture, drawn by the workers with the published numbers
# and rendered on the model's device. Beside another data set, as
#   train_dataloader = {{_base_.device_views}}
# with model = dict(data_preprocessor=dict(type='mmdensecl.DeviceViews')).
device_views = dict(
    # Pictures of different sizes cannot be stacked.
    collate_fn=dict(type='pseudo_collate'),
    dataset=dict(
        pipeline=[
            dict(type='mmdensecl.DecodeRGB'),
            dict(type='mmdensecl.SampleTwoCropParams'),
            dict(type='mmdensecl.PackImage'),
        ]
    ),
)
