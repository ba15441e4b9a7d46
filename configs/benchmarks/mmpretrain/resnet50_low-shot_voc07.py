_base_ = ['_base_/resnet50_features.py', '_base_/voc07_resize224.py']
# The same SVMs trained on 1 to 96 pictures of each class, five draws.
test_cfg = dict(
    type='mmdensecl.LowShotLoop',
    shots=(1, 2, 4, 8, 16, 32, 64, 96),
    num_samples=5,
)
