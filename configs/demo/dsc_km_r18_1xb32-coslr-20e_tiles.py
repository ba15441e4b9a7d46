_base_ = [
    './densecl_r18_1xb32-coslr-20e_tiles.py',
    '../_base_/models/dsc_km.py',
]

# DSC-KM, our interpretation of the paper: docs/method.md.
model = {{_base_.dsc_km}}
