_base_ = './fcn_r50-d8_4xb2-40k_cityscapes-769x769.py'
# Source: the frozen-backbone comparison of DenseCL's journal version (Visual
# Informatics 7(1), 2023). Its details are not public; here weights and BN
# statistics of the whole ResNet stay fixed, everything new learns.

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
