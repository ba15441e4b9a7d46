_base_ = [
    'mmseg::_base_/schedules/schedule_20k.py',
    'mmseg::_base_/default_runtime.py',
]

default_hooks = dict(
    checkpoint=dict(type='mmdensecl.SafeCheckpointHook', max_keep_ckpts=2)
)
randomness = dict(seed=0)
# The picture shows through its classes.
visualizer = dict(alpha=0.5)
