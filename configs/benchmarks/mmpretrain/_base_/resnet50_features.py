# A frozen ResNet-50 whose last map the probes read.
default_scope = 'mmpretrain'

model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
    ),  # pictures are read as BGR
    backbone=dict(
        type='ResNet',
        depth=50,
        init_cfg=dict(type='mmdensecl.PretrainedBackbone', checkpoint=None),
    ),
)

test_evaluator = []  # the loop measures

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    # One process fits while the others wait for it: at most a day.
    dist_cfg=dict(backend='nccl', timeout=86400),
)
randomness = dict(seed=0)
