_base_ = [
    './densecl_r50_8xb32-coslr-800e_coco.py',
    './_base_/models/dsc_km.py',
]

# DSC-KM, our interpretation of the paper: docs/method.md.
model = {{_base_.dsc_km}}
