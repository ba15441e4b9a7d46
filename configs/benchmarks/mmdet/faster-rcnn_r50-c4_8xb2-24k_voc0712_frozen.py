_base_ = './faster-rcnn_r50-c4_8xb2-24k_voc0712.py'
# Source: the frozen-backbone comparison of DenseCL's journal version (Visual
# Informatics 7(1), 2023). Its details are not public; here weights and BN
# statistics of the whole ResNet stay fixed, everything new learns.

model = dict(
    backbone=dict(frozen_stages=3, norm_eval=True),
    roi_head=dict(shared_head=dict(frozen=True)),
)
