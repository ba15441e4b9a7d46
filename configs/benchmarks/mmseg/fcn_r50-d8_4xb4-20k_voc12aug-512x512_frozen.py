_base_ = './fcn_r50-d8_4xb4-20k_voc12aug-512x512.py'
# Source: the frozen-backbone comparison of DenseCL's journal version (Visual
# Informatics 7(1), 2023). Its details are not public; here weights and BN
# statistics of the whole ResNet stay fixed, everything new learns.

model = dict(backbone=dict(frozen_stages=4, norm_eval=True))
