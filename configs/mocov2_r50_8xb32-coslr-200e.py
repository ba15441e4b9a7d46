_base_ = [
    './_base_/models/mocov2_r50.py',
    './_base_/datasets/two_views.py',
    './_base_/schedules/sgd_coslr_200e.py',
    './_base_/default_runtime.py',
]
