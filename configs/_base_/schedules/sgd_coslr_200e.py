optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.03, momentum=0.9, weight_decay=1e-4),
)

# Resumes exactly, also in the middle of an epoch.
train_cfg = dict(type='mmdensecl.ResumableEpochLoop', max_epochs=200)

# To zero, without warm-up, one step an epoch. Without T_max it is as long as
# the run.
param_scheduler = dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True)

# The learning rate is meant for 8 x 32 pictures; --auto-scale-lr follows.
auto_scale_lr = dict(base_batch_size=256)
