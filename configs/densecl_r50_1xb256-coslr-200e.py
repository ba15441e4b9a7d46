_base_ = './densecl_r50_8xb32-coslr-200e.py'
# The published recipe on one GPU, as exact as on eight: batch norm sees the
# images in eight groups of 32, and keys are shuffled between the groups.
model = dict(virtual_ranks=8)
train_dataloader = dict(batch_size=256, num_workers=16)
