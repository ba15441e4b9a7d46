default_scope = 'mmpretrain'

default_hooks = dict(
    # Reads logs from the device once an interval, stops at a loss that is not
    # finite.
    runtime_info=dict(type='mmdensecl.BufferedRuntimeInfoHook'),
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50),
    param_scheduler=dict(type='ParamSchedulerHook'),
    # A killed run loses an epoch at most, and never a checkpoint.
    checkpoint=dict(
        type='mmdensecl.SafeCheckpointHook', interval=1, max_keep_ckpts=3
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)

custom_hooks = [
    # Sets the epoch of the augmentation and reports unreadable pictures.
    dict(type='mmdensecl.UnlabeledDataHook'),
    # Fits queue_len='auto' to the data, warns of a queue that is too long.
    dict(type='mmdensecl.QueueLengthHook'),
    # Warns of collapse and leaks, stops at weights that are not finite.
    dict(type='mmdensecl.ContrastMonitorHook'),
    # Saves and leaves at Ctrl-C, SIGTERM or SIGUSR1, to go on with --resume.
    dict(type='mmdensecl.TerminationHook'),
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

# For TensorBoard add dict(type='TensorboardVisBackend') to this list.
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='Visualizer', vis_backends=vis_backends)

log_level = 'INFO'
# Everything but the learning rate is averaged over the window.
log_processor = dict(
    window_size=50,
    mean_pattern=r'.*(loss|time|grad_norm|match_|category_'
    r'|position_r2|_(sim|acc|std|fill)).*',
)
load_from = None
resume = False
randomness = dict(seed=0, deterministic=False)
